"""Families that the installed transformers builds or runs otherwise than today's: asked of the classes, not of a version."""

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.families import tiny
from hf_geoscale import UnsupportedModelError, patch_model

from ..conftest import tokens

NOT_BUILT_BY_4 = {
    ("emu3", "vocab_size"): "the model class for Emu3Config reads vocab_size, which its text_config has",
    ("stablelm", "qk_layernorm"): "initialisation zeroes the bias of a LayerNorm that has none",
}
"""Of a family and an option, or an attribute of the error: why transformers 4 itself cannot build it."""


def built(model_type: str, **options) -> nn.Module:
    """A tiny model of a family. Skips where this transformers lacks it, or its attention never calls the interface.

    The latter is shown by a run, and `patch_model` must then refuse the model by name.
    """
    release = f"transformers {transformers.__version__}"
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{release} has no {model_type}")
    try:
        model = tiny(model_type, **options)
    except AttributeError as error:
        reasons = [
            r
            for (name, part), r in NOT_BUILT_BY_4.items()
            if name == model_type and (part in options or part in str(error))
        ]
        if not reasons or not transformers.__version__.startswith("4."):
            raise
        pytest.skip(f"{release} cannot build {model_type}: {reasons[0]}")
    if not calls_interface(model):
        with pytest.raises(UnsupportedModelError, match=r"calls torch's attention itself .* Upgrade transformers"):
            patch_model(model)
        pytest.skip(
            f"the attention of {model_type} in {release} never calls the attention interface; patch_model refuses it"
        )
    return model


def calls_interface(model: nn.Module) -> bool:
    """Whether a forward calls an attention of ours that the interface knows."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return sdpa_attention_forward(*arguments, **options | {"softcap": None})

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("counted")
    except ValueError:  # its classes of attention stand in a table by name
        return False
    with torch.no_grad():
        model(tokens(1, 8), use_cache=False)
    model.set_attn_implementation(before)
    return bool(calls)
