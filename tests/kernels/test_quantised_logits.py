"""Logits rounded to E4M3 in the reference: values, counts, gradient."""

import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics

from ..tolerances import FLOAT32_ROUNDOFF, GRADIENT_ERROR
from .samples import draw, relative, scales


class TestQuantisedLogits:
    def test_each_logit_is_rounded_to_e4m3_and_saturates(self):
        """With a window of one key, the log-sum-exp is the logit; the second head's scale lets many go beyond the range."""
        q, k, v = draw(heads=2, kv_heads=1)
        given = scales(q, k, v)
        _, lse = fp8_attention(q, k, v, **given, window=1, return_lse=True)
        quant_scale = 448 / lse.abs().amax(dim=(0, 2)) * torch.tensor([0.9, 3.0])
        statistics = AttentionStatistics()
        _, rounded = fp8_attention(
            q, k, v, **given, window=1, return_lse=True, logit_quant_scale=quant_scale, statistics=statistics
        )
        scaled = lse * quant_scale[:, None]
        expected = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() / quant_scale[:, None]
        torch.testing.assert_close(rounded, expected, rtol=FLOAT32_ROUNDOFF, atol=1e-6)
        assert statistics.overflows_by_operand["logit"] == int((scaled.abs() > 448).sum()) > 0
        used = statistics.range_used["logit"]
        torch.testing.assert_close(used, scaled.abs().amax(dim=(0, 2)) / 448, rtol=1e-5, atol=0)

    def test_hidden_logits_are_not_counted(self):
        q, k, v = draw()
        with torch.no_grad():
            k[:, :, -1] *= 100  # seen by the last row alone
        given = scales(q, k, v)
        statistics = AttentionStatistics()
        fp8_attention(
            q, k, v, **given, logit_quant_scale=torch.full((4,), 448 / 12.0), statistics=statistics, softmax_scale=0.1
        )
        assert 0 < statistics.overflows_by_operand["logit"] <= q.shape[0] * q.shape[1]

    def test_the_gradient_passes_straight_through(self):
        """A logit moved by less than half a step changes nothing in the output, yet its gradient is that of plain attention."""
        q, k, v = (x.requires_grad_() for x in draw())
        given, quant_scale = scales(q, k, v), torch.full((4,), 448 / 16.0)
        grads = [
            torch.autograd.grad(fp8_attention(q, k, v, **given, logit_quant_scale=scale).square().sum(), (q, k, v))
            for scale in (quant_scale, None)
        ]
        for with_rounding, without in zip(*grads, strict=True):
            assert relative(with_rounding, without) < GRADIENT_ERROR
