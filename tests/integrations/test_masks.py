"""Masks: those honoured, those refused by name, and what empty rows give."""

import pytest
import torch

from hf_geoscale import (
    UnsupportedAttentionError,
    geometry_report,
    patch_model,
)

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR


class TestMasks:
    def test_honoured_4d_masks(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        causal = torch.ones(24, 24).tril().bool()
        blocks = causal & (torch.arange(24)[:, None] // 10 == torch.arange(24) // 10)
        boolean = torch.stack([causal, blocks])[:, None]
        additive = torch.zeros(2, 1, 24, 24).masked_fill(~boolean, torch.finfo(torch.float32).min)
        exact = model(ids, attention_mask=boolean).logits
        patch_model(model)
        ours = [model(ids, attention_mask=mask).logits for mask in (boolean, additive)]
        assert torch.equal(*ours)
        assert float((ours[0] - exact).norm() / exact.norm()) < OUTPUT_ERROR
        assert geometry_report(model).rows[0]["calls"] == 2

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
        from hf_geoscale.integrations.attention import geoscale_attention_forward

        for option, named in (({"softcap": 30.0}, "soft cap"), ({"s_aux": torch.zeros(4)}, "attention sinks")):
            with pytest.raises(UnsupportedAttentionError, match=named):
                geoscale_attention_forward(attention, *x, None, **option)

    def test_one_mask_for_the_whole_batch(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        mask = torch.ones(24, 24).tril().bool()[None, None]
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        assert float((model(ids, attention_mask=mask).logits - exact).norm() / exact.norm()) < OUTPUT_ERROR
