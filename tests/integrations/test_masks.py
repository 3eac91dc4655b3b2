"""Masks: those honoured, those refused by name, and what empty rows give."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model
from hf_geoscale.integrations.attention import geoscale_attention_forward
from hf_geoscale.integrations.masks import geoscale_mask, key_range_of_mask, visibility_of_call

from ..conftest import SHAPE, here, tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .compare import calls, relative

LENGTH = 24
ROWS, KEYS = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
CAUSAL = KEYS <= ROWS
MASKS = {
    "causal": CAUSAL,
    "window": CAUSAL & (KEYS > ROWS - 5),
    "blocks": CAUSAL & (ROWS // 10 == KEYS // 10),
    "blocks, both directions": ROWS // 10 == KEYS // 10,
    "prefix LM": CAUSAL | (KEYS < 7),
    "left padding": CAUSAL & (KEYS >= 4),
    "right padding": CAUSAL & (KEYS < 19),
    "both directions": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "the future": KEYS > ROWS,  # whose last row sees nothing
}
HIDDEN_VALUES = {"bool": None, "least": torch.finfo(torch.float32).min, "-inf": -torch.inf, "-1e9": -1e9}


def additive(visible: torch.Tensor, hidden: float | None) -> torch.Tensor:
    return (
        visible if hidden is None else torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, hidden)
    )


@pytest.mark.feature("4D masks")
class TestExplicitMasks:
    @pytest.mark.parametrize("hidden", HIDDEN_VALUES)
    @pytest.mark.parametrize("more", [1, 9])
    def test_columns_beyond_the_keys_are_cut_off(self, hidden, more):
        """As SDPA's and the eager attention of transformers 4 cut them: those of Persimmon and Granite MoE are one too many."""
        wide = torch.arange(LENGTH + more) <= ROWS + 2  # the last rows see keys that are not there
        expected = visibility_of_call(
            additive(wide[None, None, :, :LENGTH], HIDDEN_VALUES[hidden]), 1, LENGTH, LENGTH, True
        )
        seen = visibility_of_call(additive(wide[None, None], HIDDEN_VALUES[hidden]), 1, LENGTH, LENGTH, True)
        assert seen.key_length == LENGTH
        assert torch.equal(seen.key_range, expected.key_range)
        assert int(seen.key_range.amax()) == LENGTH

    @pytest.mark.parametrize("hidden", HIDDEN_VALUES)
    @pytest.mark.parametrize("kind", MASKS)
    def test_rows_of_contiguous_keys_are_honoured(self, kind, hidden):
        model, ids, visible = tiny_model("llama"), tokens(2, LENGTH), MASKS[kind].to(here())
        mask = additive(visible, HIDDEN_VALUES[hidden])[None, None]
        seeing = visible.any(-1)
        exact = model(ids, attention_mask=additive(visible, HIDDEN_VALUES["least"])[None, None]).logits
        patch_model(model)
        ours = model(ids, attention_mask=mask).logits
        assert calls(model) == (1, {})
        assert torch.isfinite(ours).all()
        if kind != "the future":  # every later layer sees what SDPA makes of a row without keys
            assert relative(ours[:, seeing], exact[:, seeing]) < OUTPUT_ERROR
        if kind != "causal":
            assert relative(ours, model(ids).logits) > 0.1 * OUTPUT_ERROR  # the mask matters

    @pytest.mark.parametrize("kind", MASKS)
    def test_a_row_is_what_its_visible_keys_make_it(self, kind):
        """The attention alone, undiluted by the residual stream, against float64 softmax over the visible keys."""
        attention, visible = patch_model(tiny_model("llama")).model.layers[0].self_attn, MASKS[kind].to(here())
        bound = attention.geoscale.geometry
        generator = torch.Generator().manual_seed(2)
        query, key, value = (torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2))
        assert float(key.norm(dim=-1).amax()) < float(bound.k_bound.amin())
        out, _ = geoscale_attention_forward(attention, query, key, value, visible[None, None])
        logits = query.double() @ key.double().repeat_interleave(2, 1).mT * attention.scaling
        probability = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # no visible key: 0
        exact = (probability @ value.double().repeat_interleave(2, 1)).transpose(1, 2)
        assert relative(out, exact) < OUTPUT_ERROR
        assert not out[:, ~visible.any(-1)].any()

    def test_one_row_for_all_queries(self):
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        mask = (torch.tensor([[20], [11]]) > KEYS.to(here()))[:, None, None]  # (2, 1, 1, L), as encoders pass padding
        exact = model(ids, attention_mask=mask.expand(-1, -1, LENGTH, -1)).logits
        patch_model(model)
        assert relative(model(ids, attention_mask=mask).logits, exact) < OUTPUT_ERROR
        assert calls(model) == (1, {})

    def test_heads_that_agree(self):
        model, ids, causal = patch_model(tiny_model("llama")), tokens(1, LENGTH), CAUSAL.to(here())[None, None]
        one = model(ids, attention_mask=causal).logits
        for mask in (causal.expand(1, 4, -1, -1), causal.repeat(1, 4, 1, 1)):
            assert torch.equal(model(ids, attention_mask=mask).logits, one)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
    @pytest.mark.parametrize("length", [2, LENGTH])
    def test_integers_are_refused(self, dtype, length):
        """Also where (…, 2, 2) int32 could be taken for key ranges."""
        model = patch_model(tiny_model("llama"))
        mask = torch.ones(length, length).tril().to(dtype)[None, None]
        with pytest.raises(
            UnsupportedAttentionError, match=rf"\(1, 1, {length}, {length}\) of {dtype}, which is no range"
        ):
            model(tokens(1, length), attention_mask=mask)

    def test_low_biases_are_not_taken_for_hidden(self):
        causal = CAUSAL.to(here())[None, None]
        assert key_range_of_mask(additive(causal, -1e9)) is not None
        assert key_range_of_mask(additive(causal, -1e4)) is None
        assert key_range_of_mask(additive(causal, torch.finfo(torch.float16).min).half()) is not None

    def test_analysed_once_for_all_layers(self, monkeypatch):
        model, ids, mask = patch_model(tiny_model("llama")), tokens(1, LENGTH), CAUSAL.to(here(), copy=True)[None, None]
        model(ids, attention_mask=mask)
        monkeypatch.setattr("hf_geoscale.integrations.masks.key_range_of_block", None)
        model(ids, attention_mask=mask)


@pytest.mark.feature("padding")
class TestPadding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
    def test_of_any_dtype(self, dtype):
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        mask = torch.ones(2, LENGTH, dtype=dtype)
        mask[0, :7], mask[1, 17:] = 0, 0
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        assert relative(model(ids, attention_mask=mask).logits[mask.bool()], exact[mask.bool()]) < OUTPUT_ERROR

    @pytest.mark.parametrize("length", [2, 40, 300])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_rows_without_any_key(self, length, use_cache):
        """A sequence of nothing but padding, and rows before the first token: finite, and no NaN in any gradient."""
        model, ids = patch_model(tiny_model("llama")).train(), tokens(3, min(length, 256))
        mask = torch.ones_like(ids)
        mask[0], mask[1, :-1] = 0, 0
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=use_cache)
        out.loss.backward()
        assert torch.isfinite(out.logits).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert model.model.layers[0].self_attn.v_proj.weight.grad.any()
        assert calls(model) == (1, {})

    @pytest.mark.parametrize("family", ["llama", "mistral-window"])
    def test_one_token_and_none(self, family):
        model = tiny_model(family)
        exact = model(tokens(1, 1)).logits
        patch_model(model)
        assert relative(model(tokens(1, 1)).logits, exact) < OUTPUT_ERROR
        assert calls(model) == (1, {})
        with pytest.raises(ValueError, match="at least one token, got length 0"):
            model(tokens(1, 1)[:, :0])


@pytest.mark.feature("bidirectional attention")
class TestBothDirections:
    def model(self):
        if not hasattr(masking_utils, "create_bidirectional_mask"):
            pytest.skip("this transformers has no bidirectional decoders (config.is_causal)")
        model = tiny_model("llama")
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        return model

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_decoder_as_an_encoder(self, padded):
        model, ids = self.model(), tokens(2, LENGTH)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :5], mask[1, 20:] = 0, 0
        exact = model(ids, attention_mask=mask, use_cache=False).logits
        patch_model(model)
        ours = model(ids, attention_mask=mask, use_cache=False).logits
        assert relative(ours[mask.bool()], exact[mask.bool()]) < OUTPUT_ERROR
        assert calls(model) == (1, {})
        other = ids.clone()
        other[:, 19] = (ids[:, 19] + 1) % 90 + 3
        changed = model(other, attention_mask=mask, use_cache=False).logits
        assert not torch.equal(changed[:, 6], ours[:, 6])  # the past does see the future


@pytest.mark.feature("inputs_embeds")
class TestInputs:
    @pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
    def test_embeddings_of_any_size_and_stride(self, size):
        """The certificates bound what leaves the norm layer, whatever enters it."""
        model, wide = tiny_model("llama"), torch.randn(2, LENGTH, 128, generator=torch.Generator().manual_seed(1))
        embeds = size * wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
        assert not embeds.is_contiguous()
        exact = model(inputs_embeds=embeds).logits
        patch_model(model)
        assert relative(model(inputs_embeds=embeds).logits, exact) < OUTPUT_ERROR
        assert calls(model) == (1, {})

    def test_inference_mode(self):
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        patch_model(model)
        expected = model(ids, attention_mask=mask).logits
        with torch.inference_mode():
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_a_chunk_is_no_window():
    """Chunked attention (Llama 4) is in the mask alone: it may not be left out for the layer's own flags."""
    config = LlamaConfig(**SHAPE, attention_chunk_size=8)
    chunks = {
        "mask_function": masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)),
        "local_size": 8,
    }
    sizes = {"batch_size": 1, "q_length": LENGTH, "kv_length": LENGTH, "device": here(), "config": config}
    if "cache_position" in LlamaForCausalLM.forward.__code__.co_varnames:
        sizes["cache_position"] = torch.arange(LENGTH)
    expected = torch.stack([torch.arange(LENGTH) // 8 * 8, torch.arange(LENGTH) + 1], -1)
    assert torch.equal(geoscale_mask(**sizes, **chunks)[0, 0], expected.int())
    assert geoscale_mask(**sizes) is None


@pytest.mark.feature("4D masks")
class TestMasks:
    @pytest.mark.parametrize("kind", ["hole", "bias", "per head"])
    def test_masks_that_cannot_be_honoured(self, kind):
        model, ids = tiny_model("llama"), tokens(1, 24)
        mask = torch.zeros(1, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), torch.finfo(torch.float32).min)
        if kind == "hole":
            mask[..., 10:, 5] = torch.finfo(torch.float32).min
        elif kind == "bias":
            mask[..., 10, 5] = -0.5
        else:
            mask = mask.repeat(1, 4, 1, 1)
            mask[:, 1, 20, 0] = torch.finfo(torch.float32).min
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        with pytest.raises(UnsupportedAttentionError, match=r"\(1, [14], 24, 24\) of torch.float32.*fallback='sdpa'"):
            model(ids, attention_mask=mask)
        patch_model(model, fallback="sdpa")
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, exact)
        row = geometry_report(model).rows[0]
        assert row["calls"] == 0
        assert row["fallback_calls"] == 1

    def test_a_mask_changed_in_place_is_read_again(self):
        model, ids = patch_model(tiny_model("llama"), fallback="sdpa"), tokens(1, 24)
        mask = torch.ones(24, 24).tril().bool()[None, None].clone()
        first = model(ids, attention_mask=mask).logits
        mask[..., 12:, :12] = False
        assert not torch.equal(model(ids, attention_mask=mask).logits, first)

    def test_padding_with_a_hole(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 24)
        mask = torch.ones_like(ids)
        mask[:, 10] = 0
        with pytest.raises(UnsupportedAttentionError, match="no range of keys"):
            model(ids, attention_mask=mask)

    def test_what_neither_fp8_nor_sdpa_has_is_refused_even_with_a_fallback(self):
        model = patch_model(tiny_model("llama"), fallback="sdpa")
        with pytest.raises(UnsupportedAttentionError, match="attention probabilities"):
            model(tokens(1, 8), output_attentions=True)
        attention = model.model.layers[0].self_attn
        x = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
        with pytest.raises(UnsupportedAttentionError, match="sinks"):
            geoscale_attention_forward(attention, *x, None, s_aux=torch.zeros(4))

    def test_one_mask_for_the_whole_batch(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        mask = torch.ones(24, 24).tril().bool()[None, None]
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        assert float((model(ids, attention_mask=mask).logits - exact).norm() / exact.norm()) < OUTPUT_ERROR
