"""The fused kernels at large, tiny, zero and adversarial values, and where scales change inside a sequence."""

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, reference
from hf_geoscale.kernels.backend import triton_missing

from ..tolerances import FLOAT32_ROUNDOFF, OUTPUT_ERROR, matrix_unit_error
from .fused_cases import DEVICE, NEEDS_KERNELS, agree, operands, ranges, run
from .samples import relative, scales

pytestmark = NEEDS_KERNELS
if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import passes


class TestExtremes:
    @pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**-12, 2.0**3, 2.0**20])
    def test_magnitudes(self, magnitude):
        """Logits in the hundreds and operands near zero.

        Without the mix, so that both quantise the same bits: one flipped rounding of q8 moves a logit of 500 by several units.
        """
        leaves, _ = operands({"rows": 192})
        leaves = [(x * magnitude).detach().requires_grad_() for x in leaves]
        options = {**scales(*leaves), "softmax_scale": 0.125 if magnitude < 2**20 else 2.0**-38, "incoherent": False}
        _, lse = fp8_attention(*leaves, **options, backend="reference", return_lse=True)
        assert agree(run(leaves, options), run(leaves, options, "reference"), float(lse.square().mean().sqrt()))

    @pytest.mark.parametrize("dim", [64, 128])
    def test_logits_are_as_exact_as_the_matrix_unit(self, dim):
        """With a window of one key, the log-sum-exp is a logit; channel 0 outweighs the others, which costs their last bits."""
        leaves, _ = operands({"rows": 192, "heads": 1, "dim": dim})
        with torch.no_grad():
            leaves[0][..., 0] *= 8
            leaves[1][..., 0] *= 8
        options = {**scales(*leaves), "window": 1, "softmax_scale": 1.0, "incoherent": False}
        _, lse = fp8_attention(*leaves, **options, backend="triton", return_lse=True)
        q, k = (
            (x.detach().float() * options[f"{name}_quant_scale"].view(-1, 1, 1)).to(torch.float8_e4m3fn).double()
            / options[f"{name}_quant_scale"].view(-1, 1, 1)
            for x, name in zip(leaves[:2], "qk", strict=True)
        )
        exact_logits = (q * k).sum(-1)
        allowed = matrix_unit_error(dim) if DEVICE.type == "cuda" else FLOAT32_ROUNDOFF
        assert relative(lse.double(), exact_logits) < allowed

    def test_logits_of_a_hundred_thousand_stay_finite(self):
        leaves, _ = operands({"rows": 192})
        leaves = [(x * 2.0**7).detach().requires_grad_() for x in leaves]
        results = run(leaves, scales(*leaves))
        assert all(torch.isfinite(x).all() for x in results)
        assert float(results[0].float().norm(dim=-1).amax()) < 1.1 * float(leaves[2].float().norm(dim=-1).amax())

    def test_padded_rows_with_logits_far_below_minus_88(self):
        """L % 128 == 64 with padding: where cuDNN's BF16 backward gives NaN."""
        leaves, options = operands({"batch": 2, "rows": 192})
        with torch.no_grad():
            leaves[0].copy_(-leaves[1].repeat_interleave(2, 1) * 8)  # each row's own key gets about −8·64·softmax_scale
        options |= scales(*leaves) | {"softmax_scale": 1.0, "key_range": ranges("padding", 192).to(DEVICE)}
        _, lse = fp8_attention(*leaves, **options, backend="triton", return_lse=True)
        first_seen = lse[0, :, 37]
        assert float(first_seen.max()) < -88
        mine, theirs = run(leaves, options), run(leaves, options, "reference")
        assert all(torch.isfinite(x).all() for x in mine)
        assert agree(mine, theirs)

    def test_one_token_takes_everything(self):
        """Adversarial: key 3 wins every row by a wide margin, so O is its value and P̃ is 1 or 0."""
        leaves, options = operands({"rows": 100, "causal": False})
        with torch.no_grad():
            leaves[0].copy_(torch.ones_like(leaves[0]))
            leaves[1][:, :, 3] = 40.0
        options |= scales(*leaves)
        out = fp8_attention(*leaves, **options, backend="triton")
        expected = leaves[2][:, :, 3:4].repeat_interleave(2, 1).expand_as(out)
        assert relative(out, expected) < OUTPUT_ERROR

    def test_zeros(self):
        leaves = [torch.zeros(1, 2, 70, 64, device=DEVICE, requires_grad=True) for _ in range(3)]
        one = torch.ones(2, device=DEVICE)
        results = run(leaves, {f"{n}_quant_scale": one for n in "qkv"})
        assert all(torch.isfinite(x).all() for x in results)
        assert float(results[0].abs().max()) == 0

    @pytest.mark.parametrize("zero", ["q and k", "v", "gradient", "everything"])
    def test_zeros_under_the_scales_of_zero_weights(self, zero):
        """Weights that are all zero have scales of 448·2⁶⁰ and more: products of their descales leave float32."""
        leaves, options = operands({"rows": 70})
        grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(leaves[0]) * 1e-5
        with torch.no_grad():
            for i, name in enumerate("qkv"):
                if zero == "everything" or name in zero.split():
                    leaves[i].zero_()
                    options[f"{name}_quant_scale"] = torch.full_like(options[f"{name}_quant_scale"], 448 * 2.0**70)
            if zero in ("gradient", "everything"):
                grad.zero_()
        results = {}
        for backend in ("triton", "reference"):
            out = fp8_attention(*leaves, **options, backend=backend)
            results[backend] = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert all(torch.isfinite(x).all() for x in results["triton"])
        assert agree(results["triton"], results["reference"])

    @pytest.mark.parametrize("value", [float("inf"), pytest.param(float("nan"), marks=pytest.mark.gpu)])
    def test_a_gradient_that_is_no_number_is_counted_and_comes_out(self, value):
        """Triton's interpreter casts NaN to a finite E4M3 number; CUDA's instruction keeps it."""
        leaves, options = operands({"rows": 70})
        counts = {}
        for backend in ("triton", "reference"):
            statistics = AttentionStatistics(observe_logits=True)
            out = fp8_attention(*leaves, **options, backend=backend, statistics=statistics)
            grad = torch.zeros_like(out)
            torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert statistics.overflows_by_operand["logit gradient"] == 0
            grad[0, 0, 3, 5] = value
            assert not any(torch.isfinite(x).all() for x in torch.autograd.grad(out, leaves, grad))
            counts[backend] = statistics.overflows_by_operand
        assert counts["triton"]["logit gradient"] > 0
        assert counts["reference"]["logit gradient"] > 0

    @pytest.mark.parametrize("options", [{}, {"window": 50}, {"causal": False}], ids=str)
    def test_scales_that_change_between_groups_of_rows(self, options, monkeypatch):
        """dO a thousand times larger in one group and zero in another; groups of 128 rows, the most that one tile takes."""
        monkeypatch.setattr(passes, "GRADIENT_ROWS", 128)
        monkeypatch.setattr(reference, "GRADIENT_ROWS", 128)
        leaves, options = operands({"rows": 400, **options})
        grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(leaves[0])
        grad[:, :, 128:256] *= 1000
        grad[:, :, 256:384] = 0
        results = []
        for backend in ("triton", "reference"):
            out = fp8_attention(*leaves, **options, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        assert agree(*results)
