"""Sums of like products in Gram matrices: what geometry/tensor_cores.py assumes of matrix units, on this device and in their model.

A diagonal entry of a Gram matrix is a sum of squares, so every addition can lose something, and all losses have one sign. The
assumption: K products of BF16 or FP16 numbers summed in one float32 are off by at most K·2⁻²³ of the sum of their
magnitudes, whatever they are.
"""

import pytest
import torch
from torch import Tensor

from hf_geoscale.geometry import Projection, batch
from hf_geoscale.geometry import tensor_cores as tc
from hf_geoscale.kernels.backend import TRITON_INSTALLED

from .accumulator import multiply_add
from .fused_cases import DEVICE

if TRITON_INSTALLED:
    from hf_geoscale.kernels import gram

WIDTHS = (8192, 16384)
DIMS = (64, 128)
ALMOST = 1.4140625 * 2.0**-12
"""Squares of it lie just below the last place of 1."""

WITH_TRITON = pytest.mark.skipif(
    not TRITON_INSTALLED or not gram.takes(64, DEVICE), reason="needs Triton, and a GPU that multiplies BF16"
)


def rows_of(kind: str, dim: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(dim, width) on the CPU."""
    generator = torch.Generator().manual_seed(width + dim)
    if kind == "equal":
        return torch.full((dim, width), 1.4140625).to(dtype)
    if kind == "with a mean":
        return (1 + 0.3 * torch.randn(dim, width, generator=generator)).to(dtype)
    position = torch.arange(width).expand(dim, width)
    first = position == 0 if kind == "one dominating" else position % tc.SUM_WIDTH == 0
    return torch.where(first, 1.0, ALMOST).to(dtype)


KINDS = ("equal", "with a mean", "one dominating", "one dominating a part")


def share_of_allowance(grams: Tensor, rows: Tensor, allowed: float) -> float:
    """Largest error of an entry over `allowed` times the sum of its products' magnitudes."""
    rows = rows.to(grams.device).double()
    error = (grams.double() - rows @ rows.mT).abs()
    return float((error / (rows.abs() @ rows.abs().mT)).max()) / allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
class TestGrams:
    @WITH_TRITON
    @pytest.mark.parametrize("dim", DIMS)
    def test_the_kernel(self, kind, width, dim):
        rows = rows_of(kind, dim, width)
        out = torch.empty(1, dim, dim, device=DEVICE)
        gram.grams([(rows[None].to(DEVICE), None, 0)], out, tc.SUM_WIDTH)
        assert share_of_allowance(out[0], rows, tc.sum_error(width)) <= 1

    @pytest.mark.parametrize("dim", DIMS)
    def test_torch(self, kind, width, dim):
        """`torch.bmm` with BF16 operands and a float32 result on a GPU; float32 operands elsewhere."""
        rows = rows_of(kind, dim, width)
        out = torch.empty(1, dim, dim, device=DEVICE)
        batch._scaled_grams([Projection(rows[None].to(DEVICE))], out)
        assert share_of_allowance(out[0], rows, tc.sum_error(width)) <= 1

    def test_the_model_of_a_hopper_unit(self, kind, width):
        """16 products an instruction, cut 25 bits below the largest exponent; their sum cut to float32's 23 bits."""
        rows = rows_of(kind, 4, width)
        total = torch.zeros(4, 4)
        for part in rows.split(tc.partition(width)[1], 1):
            total += multiply_add(part, part.T, torch.zeros(4, 4), 25, 16, 23, least_power=2.0**-126)
        assert share_of_allowance(total, rows, tc.sum_error(width)) <= 1


@pytest.mark.parametrize("kind", ["equal", "with a mean", "one dominating"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_squares_in_float16(kind, dim):
    """The trace powers' products, of matrices whose norm is 1: half_looseness allows D·2⁻²³ of the magnitudes."""
    half = rows_of(kind, dim, dim, torch.float32)
    half = (half / half.norm()).half()
    found = tc.products(half[None].to(DEVICE))[0]
    assert share_of_allowance(found, half, tc.SLACK * dim * tc.ADDITION) <= 1


def test_the_model_of_a_unit_that_drops_bits_is_told_apart():
    """A sum as FP8 units add, 13 bits, is far beyond the allowance: the checks above can fail."""
    rows = rows_of("with a mean", 4, 8192)
    total = multiply_add(rows, rows.T, torch.zeros(4, 4), 13, 32, least_power=2.0**-126)
    assert share_of_allowance(total, rows, tc.sum_error(8192)) > 100
