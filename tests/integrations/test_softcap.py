"""A patched model whose attention calls carry a soft cap: FP8 where it can, plain PyTorch where SDPA would have run."""

import logging
import math

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.integrations.softcap import softcap_attention_forward

from ..conftest import tiny_model, tokens
from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR

pytestmark = pytest.mark.feature("soft cap")
CAP = 0.5
"""Logits of a tiny model are around 1."""


@pytest.fixture
def exact():
    """The tiny Llama under Gemma 2's own eager attention; a keyword of the model's forward reaches every attention call."""
    AttentionInterface.register("gemma2_eager", eager_attention_forward)
    AttentionMaskInterface.register("gemma2_eager", eager_mask)
    model = tiny_model("llama")
    model.set_attn_implementation("gemma2_eager")
    return model


def relative(mine: Tensor, truth: Tensor) -> float:
    return float((mine - truth).detach().norm() / truth.detach().norm())


class TestModel:
    def test_logits_and_gradients(self, exact):
        model, ids = patch_model(tiny_model("llama")), tokens(2, 40)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, :9], labels[0, :10] = 0, -100  # token 9 is foretold by a row that sees nothing
        for given in ({"labels": ids}, {"labels": labels, "attention_mask": mask}):
            losses = [m(ids, softcap=CAP, **given).loss for m in (model, exact)]
            weights = [m.model.layers[0].self_attn.q_proj.weight for m in (model, exact)]
            mine, truth = (torch.autograd.grad(x, w)[0] for x, w in zip(losses, weights, strict=True))
            assert relative(losses[0], losses[1]) < 1e-3
            assert relative(mine, truth) < GRADIENT_ERROR
            plain = torch.autograd.grad(exact(ids, **given).loss, weights[1])[0]
            assert relative(plain, truth) > 2 * GRADIENT_ERROR  # so the comparison sees the cap
        rows = geometry_report(model).rows
        assert all(row["calls"] == 2 and row["fallback_calls"] == row["overflows"] == 0 for row in rows)

    def test_decoding_keeps_the_cap_and_is_counted(self, exact):
        model, ids = patch_model(tiny_model("llama")), tokens(2, 24)
        with torch.no_grad():
            truth = exact(ids, softcap=CAP).logits[:, -1]
            cache = model(ids[:, :-1], softcap=CAP, use_cache=True).past_key_values
            mine = model(ids[:, -1:], softcap=CAP, past_key_values=cache).logits[:, -1]
            plain = exact(ids).logits[:, -1]
        assert relative(mine, truth) < OUTPUT_ERROR
        assert relative(mine, truth) < 0.5 * relative(plain, truth)
        assert all(row["fallback_reasons"] == {"kv_cache": 1} for row in geometry_report(model).rows)

    def test_a_mask_fp8_cannot_honour_runs_in_plain_pytorch(self, exact, caplog):
        model, ids = patch_model(tiny_model("llama"), fallback="sdpa"), tokens(2, 24)
        mask = torch.ones_like(ids)
        mask[:, 10] = 0
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            mine = model(ids, softcap=CAP, attention_mask=mask).logits
            truth = exact(ids, softcap=CAP, attention_mask=mask).logits
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
        assert "runs in plain PyTorch" in caplog.text
        assert all(row["fallback_calls"] == 1 for row in geometry_report(model).rows)

    @pytest.mark.parametrize("scaling", ["geometry", "current"])
    def test_quantised_logits_use_the_cap_as_their_bound(self, scaling):
        """A cap far below the certificate: nothing overflows, and logits use more of the range than they would without it."""
        ids, used = tokens(2, 24), []
        for softcap in (None, CAP):
            model = patch_model(tiny_model("llama"), quantize_logits=True, scaling=scaling)
            with torch.no_grad():
                model(ids, softcap=softcap)
            rows = geometry_report(model).rows
            assert all(row["overflows"] == 0 for row in rows)
            used.append(max(row["logit_utilisation"] for row in rows))
        assert 0.5 < used[1] <= 1
        assert scaling == "current" or used[1] > 2 * used[0]


class TestPlainAttention:
    """Against float64, written out."""

    def operands(self, rows=7, keys=11) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16))
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def truth(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
        logits = CAP * (q @ k.mT * 0.25 / CAP).tanh()
        return (logits.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)

    @pytest.mark.parametrize("kind", ["bool", "additive", "per head", "none", "one row"])
    def test_masks_and_gradients(self, kind):
        q, k, v = self.operands(rows=1 if kind == "one row" else 7)
        visible = torch.rand(2, 4 if kind == "per head" else 1, 7, 11, generator=torch.Generator().manual_seed(1)) > 0.4
        visible[..., 0] = True
        mask: Tensor | None = visible
        if kind == "additive":
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        elif kind == "none":  # an empty static cache: the first keys are the queries' own
            mask, visible = None, torch.ones(7, 11).tril().bool()
        elif kind == "one row":
            mask, visible = None, torch.ones(1, 11).bool()
        out, weights = softcap_attention_forward(torch.nn.Module(), q, k, v, mask, softcap=CAP, scaling=0.25)
        truth = self.truth(q, k, v, visible)
        assert weights is None
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, truth)]
        for mine, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)

    def test_a_row_that_sees_nothing_gives_no_nan(self):
        q, k, v = self.operands()
        mask = torch.zeros(2, 1, 7, 11, dtype=torch.bool)
        out, _ = softcap_attention_forward(torch.nn.Module(), q, k, v, mask, softcap=CAP, scaling=0.25)
        assert torch.isfinite(out).all()

    def test_dropout_drops(self):
        q, k, v = self.operands()
        ones = torch.ones_like(v)
        out, _ = softcap_attention_forward(torch.nn.Module(), q, k, ones, None, softcap=CAP, scaling=0.25, dropout=0.5)
        assert float(out.detach().std()) > 0.1  # without dropout every entry is 1
