"""Transformer Engine's FP8 linear layers, as accelerate installs them, and its FP8 attention: rivals in `training.py linears`.

Written against Transformer Engine 2.20. Importing this raises where it, or the CUDA library it needs, is missing.
"""

from weakref import WeakKeyDictionary

import torch
import transformer_engine.pytorch as te
from accelerate import Accelerator
from accelerate.utils.transformer_engine import convert_model
from torch import Tensor, nn
from transformer_engine.common.recipe import DelayedScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "transformer_engine"
RECIPES = {
    "linears": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16),
    "linears and attention": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, fp8_dpa=True),
}
"""E4M3 forward, E5M2 backward; the second runs attention in FP8 too (head dimension 128 on Hopper)."""

_cores: WeakKeyDictionary[nn.Module, te.DotProductAttention] = WeakKeyDictionary()
"""One core an attention module, since it keeps amax histories; gone with the module."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_
) -> tuple[Tensor, None]:
    """Causal attention in the attention interface's form.

    With `fp8_dpa` Transformer Engine disables every other backend in training: the call runs in FP8 or raises ValueError.
    """
    batch, heads, length, dim = query.shape
    if module not in _cores:
        core = te.DotProductAttention(heads, dim, key.shape[1], qkv_format="bshd", attn_mask_type="causal")
        _cores[module] = core.train(module.training)
    out = _cores[module](*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
    return out.view(batch, length, heads, dim), None


def use_linears(model: PreTrainedModel) -> None:
    """Replace every linear layer, as accelerate's mixed_precision="fp8" does. The optimizer must be made after it."""
    Accelerator()  # convert_model asks its state for DeepSpeed, and raises before there is one
    with torch.no_grad():
        convert_model(model)
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if left:  # accelerate stops at the first layer whose widths are no multiples of 16
        raise ValueError(
            f"accelerate left {len(left)} linear layers in BF16, the first {left[0]}; widths must divide by 16"
        )


def use_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)


def autocast(attention_too: bool) -> te.autocast:
    """The context that a training step's forward runs in, good for one use."""
    return te.autocast(enabled=True, recipe=RECIPES["linears and attention" if attention_too else "linears"])


def forget() -> None:
    """Drop the amax histories of models that are gone, which every later step would go on updating."""
    FP8GlobalStateManager.reset()
