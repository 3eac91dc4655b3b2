"""Decoders whose configuration, wrapping or windows defeat a certificate or a mask that looks right."""

import peft
import pytest
import torch
from torch import nn

try:
    from transformers.integrations.neftune import neftune_post_forward_hook
except ImportError:  # transformers 4
    from transformers.trainer_utils import neftune_post_forward_hook

from benchmarks.families import tiny
from hf_geoscale import (
    UnsupportedAttentionError,
    UnsupportedModelError,
    geometry_report,
    patch_model,
)
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.families import attention_sites

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .releases import built
from .test_families import relative


def overflows(model) -> int:
    return sum(row["overflows"] for row in geometry_report(model).rows)


@pytest.mark.feature("family: opt")
def test_post_norm_opt_is_refused():
    """OPT-350m: its norm layer follows the attention."""
    with pytest.raises(UnsupportedModelError, match="do_layer_norm_before=False"):
        patch_model(tiny("opt", do_layer_norm_before=False))


@pytest.mark.feature("family: olmo2")
class TestResidualStream:
    def test_an_embedding_of_modules_to_save_is_the_one_that_counts(self):
        model = patch_model(tiny("olmo2"))
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        )
        with torch.no_grad():
            wrapped.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(500)
            wrapped(input_ids=tokens(1, 16))
        assert overflows(model) == 0

    def test_noise_on_the_embedding_is_refused(self):
        model = patch_model(tiny("olmo2")).train()
        embedding = model.get_input_embeddings()
        embedding.neftune_noise_alpha = 15
        hook = embedding.register_forward_hook(neftune_post_forward_hook)
        with pytest.raises(UnsupportedAttentionError, match="neftune_post_forward_hook"):
            model(tokens(1, 16))
        hook.remove()
        model.enable_input_require_grads()
        model(tokens(1, 16))

    def test_embeddings_by_position_are_refused(self):
        model = patch_model(tiny("olmo2"))
        with pytest.raises(UnsupportedAttentionError, match="inputs_embeds"):
            model.model(None, None, None, None, torch.randn(1, 8, 64))


def test_rotary_embeddings_in_a_container_are_run():
    """OLMo 3 of transformers 4 keeps them in a ModuleDict; here one of YaRN, whose factor the certificates must have."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scaled = tiny("llama", rope_parameters=yarn, rope_scaling=yarn).model.rotary_emb
    assert scaled.attention_scaling > 1.1
    model = tiny("llama")
    before = operand_bound(next(attention_sites(model)).projections()[0])
    model.model.rotary_embs = nn.ModuleDict({"full_attention": scaled})
    site = next(attention_sites(model))
    assert scaled in site.rotary
    torch.testing.assert_close(operand_bound(site.projections()[0]), before * scaled.attention_scaling)


@pytest.mark.feature("sliding window")
@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe", "mistral"])
def test_a_window_hides_what_is_behind_it(family):
    window = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2} if family == "qwen2_moe" else {}
    model = patch_model(built(family, sliding_window=8, num_hidden_layers=2, **window))
    ids = tokens(1, 40)
    other = ids.clone()
    other[:, :8] = tokens(1, 8, seed=1)
    with torch.no_grad():
        a, b = (model(x, use_cache=False).logits[:, -1] for x in (ids, other))
    assert torch.equal(a, b)


@pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")
def test_a_quantised_base_whose_norms_have_no_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, ids = tiny("olmo"), tokens(1, 16)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            plain = getattr(layer.self_attn, name)
            four_bit = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, False, quant_type="nf4")
            four_bit.weight = bitsandbytes.nn.Params4bit(
                plain.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
            setattr(layer.self_attn, name, four_bit.to(plain.weight.device))
    with torch.no_grad():
        exact = model(ids).logits
        for headroom in (1.0, 4.0):
            patch_model(model, headroom=headroom)
            assert relative(model(ids).logits, exact) < OUTPUT_ERROR
    assert overflows(model) == 0


@pytest.mark.feature("DPO reference (frozen copy)")
def test_a_frozen_model_ignores_steps_of_others():
    frozen, other = patch_model(tiny_model("llama")), nn.Linear(2, 2)
    frozen.requires_grad_(False)
    frozen(tokens(1, 8))
    before = [layer.geometry for layer in geoscale_layers(frozen)]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    frozen(tokens(1, 8))
    assert all(a is layer.geometry for a, layer in zip(before, geoscale_layers(frozen), strict=True))
    with torch.no_grad():
        frozen.model.layers[0].self_attn.q_proj.weight.mul_(2)
    frozen(tokens(1, 8))
    assert geoscale_layers(frozen)[0].geometry is not before[0]
