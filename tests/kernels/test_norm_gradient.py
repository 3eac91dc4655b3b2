"""The kernel of the gradient of RMS norms alone, against float64 autograd of the norm."""

import pytest
import torch

from hf_geoscale.kernels.backend import triton_missing
from hf_geoscale.kernels.qk_norm import rms_norm

from ..tolerances import BF16_LOSSES, FLOAT32_ROUNDOFF
from .fused_cases import DEVICE, NEEDS_KERNELS
from .samples import relative
from .test_fused import poison
from .test_qk_norm import EPS, weights

if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels.qk_norm_tile import CHUNK_ROWS, norm_gradient


class TestNormGradient:
    """The kernel alone, against float64 autograd of the norm."""

    pytestmark = NEEDS_KERNELS

    @pytest.mark.parametrize(
        ("dim", "n_queries", "n_keys", "norm_dtype"),
        [
            (80, 37, 53, torch.bfloat16),
            (16, 7, 513, torch.float32),
            pytest.param(16, 1025, 5, torch.bfloat16, marks=pytest.mark.gpu),
        ],
    )
    def test_against_autograd(self, dim, n_queries, n_keys, norm_dtype, monkeypatch):
        generator = torch.Generator().manual_seed(1)
        shapes = (2, 3, n_queries, dim), (2, 2, n_keys, dim)
        x = [(3 * torch.randn(s, generator=generator)).to(DEVICE, torch.bfloat16) for s in shapes]
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
        grads = [torch.randn(s, generator=generator).to(DEVICE, torch.bfloat16) for s in shapes]
        norms = [w.detach() for w in weights(dim, norm_dtype)]
        wide = [t.double().requires_grad_() for t in (*x, *norms)]
        y = [t * (t.square().mean(-1, keepdim=True) + EPS).rsqrt() * w for t, w in zip(wide[:2], wide[2:], strict=True)]
        theirs = torch.autograd.grad(y, wide, [g.double() for g in grads])
        poison(monkeypatch)
        partial = norm_gradient(*x, *norms, EPS, *grads)
        assert partial.shape == (2, 5, -(-max(n_queries, n_keys) // CHUNK_ROWS), dim)
        for mine, exact_grad in zip(grads, theirs[:2], strict=True):
            assert relative(mine, exact_grad) < BF16_LOSSES / 2  # one rounding to bfloat16
        for mine, exact_grad in zip(partial.split((3, 2), 1), theirs[2:], strict=True):
            assert relative(mine.sum((0, 1, 2)), exact_grad) < BF16_LOSSES  # each x̂ rounded to bfloat16

    def test_weights_get_the_rounded_quotients(self):
        """Equal rows, so that roundings add up instead of cancelling; the device's rsqrt may flip one in a few hundred."""
        row = torch.randn(64, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
        x, norm = row.expand(1, 1, 20, 64).contiguous(), torch.ones(64, device=DEVICE, dtype=torch.bfloat16)
        partial = norm_gradient(x, x, norm, norm, EPS, torch.ones_like(x), torch.ones_like(x))
        due = 20 * 2 * rms_norm(row, norm, EPS).float()  # rows of q and of k
        assert ((partial.sum((0, 1, 2)) - due).abs() <= FLOAT32_ROUNDOFF * due.abs()).float().mean() > 0.9

    def test_a_row_of_zeros_gives_its_gradient_over_root_epsilon(self):
        x, norm = torch.zeros(1, 1, 4, 16, device=DEVICE, dtype=torch.bfloat16), torch.full((16,), 2.0, device=DEVICE)
        grads = [torch.ones_like(x), torch.ones_like(x)]
        partial = norm_gradient(x, x, norm, norm, EPS, *grads)
        torch.testing.assert_close(
            grads[0].float(), torch.full_like(grads[0].float(), 2 * EPS**-0.5), rtol=BF16_LOSSES, atol=0
        )
        assert not partial.any()
