"""Columns are transposed rows, bit for bit: every launch shape and dtype of the kernels that quantise."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_geoscale.scaling import E4M3 as FORMAT

from .fused_cases import DEVICE, NEEDS_KERNELS

pytestmark = NEEDS_KERNELS

E4M3 = torch.float8_e4m3fn
HEADS, LENGTH, PADDED, GROUP = 2, 131, 256, 2048
LARGEST = 512.0
USUAL = (64, 4)
"""Rows of a program and warps, as the op launches these kernels."""

OTHERS = ((16, 1), (32, 2), (32, 4), (64, 1), (64, 2), (64, 8), (128, 4), (128, 8))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def named(block: int, warps: int, dim: int, dtype: torch.dtype, gpu: bool):
    name = f"{block} rows, {warps} warps, dim {dim}, {str(dtype).removeprefix('torch.')}"
    return pytest.param(block, warps, dim, dtype, id=name, marks=[pytest.mark.gpu] if gpu else [])


SHAPES = [named(*USUAL, dim, dtype, gpu=dim > 80) for dim in (16, 32, 64, 80, 96, 128, 256) for dtype in DTYPES]
SHAPES += [
    named(*shape, dim, dtype, gpu=True)
    for shape, dim, dtype in itertools.product(OTHERS, (16, 128), (torch.bfloat16, torch.float32))
]

SPECIAL = [
    math.nan,
    math.inf,
    FORMAT.max,
    0.0,
    2**-9,
    2**-10,
    3 * 2**-11,
    5 * 2**-11,
    2**-6,
    17.0,
    19.0,
    464.0,
    480.0,
    6e4,
]
"""NaN, ∞, the largest value, subnormals, values halfway between two, and values beyond."""


def drawn(dim: int, dtype: torch.dtype) -> Tensor:
    """Random values over most binades of E4M3, and the special ones with both signs: (1, H, L, D), heads inside."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(1, LENGTH, HEADS, dim, generator=generator)
    x *= torch.exp2(torch.randint(-12, 10, x.shape, generator=generator))
    places = torch.randperm(x.numel(), generator=generator)[: 8 * len(SPECIAL)]
    x.view(-1)[places] = torch.tensor([sign * value for sign in (1, -1) for value in SPECIAL]).repeat(4)
    return x.to(DEVICE, dtype).transpose(1, 2)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def rounded(x: Tensor) -> Tensor:
    """E4M3 of the specification."""
    return x.float().clamp(-FORMAT.max, FORMAT.max).to(E4M3)


def assert_same_values(found: Tensor, expected: Tensor) -> None:
    """The same bits, but for the sign of NaN."""
    is_nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), is_nan)
    assert torch.equal(bits(found)[~is_nan], bits(expected)[~is_nan])


def as_columns(rows: Tensor, paired: bool = False) -> Tensor:
    """(B, H, L, D) → (B, H, D, Lp) in the order in which a product contracts, zero from L on."""
    position = torch.arange(PADDED, device=rows.device)
    if paired:
        source = position // 16 * 16 + position % 2 * 8 + position // 2 % 8
    else:
        source = position // 16 * 16 + position // 2 % 2 * 8 + position // 4 % 4 * 2 + position % 2
    padded = torch.zeros(*rows.shape[:2], PADDED, rows.shape[3], dtype=torch.uint8, device=rows.device)
    padded[:, :, : rows.shape[2]] = bits(rows)
    return padded[:, :, source].mT


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Filled with bytes that no kernel here writes."""
    return torch.full((*shape, dtype.itemsize), 0xA5, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def padded_dim(dim: int) -> int:
    from hf_geoscale.kernels.tiles import padded_head_dim

    return padded_head_dim(dim)


@pytest.mark.parametrize(("block", "warps", "dim", "dtype"), SHAPES)
def test_operands(block, warps, dim, dtype):
    """One tensor as q, k and v: rows of q8 and k8, columns of v8."""
    from hf_geoscale.kernels.quantize import quantize_kernel

    x, one = drawn(dim, dtype), torch.ones(HEADS, device=DEVICE)
    q8, k8, residual = (empty(1, HEADS, LENGTH, dim, dtype=E4M3) for _ in range(3))
    v8, counters = empty(1, HEADS, dim, PADDED, dtype=E4M3), torch.zeros(3 * HEADS, device=DEVICE)
    quantize_kernel[3 * HEADS, PADDED // block](
        x, x, x, one, one, one, None, q8, k8, residual, v8, counters, counters, counters, None, None, None, None,
        *x.stride() * 3, 0, 0, 0.0, 1, HEADS, HEADS, LENGTH, LENGTH, PADDED, D=dim, DP=padded_dim(dim), TURNED=0,
        INTERLEAVED=False, NORM=False, MIX=0, HIGH=True, COUNT=False, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    assert_same_values(q8, rounded(x))
    assert torch.equal(bits(q8), bits(k8))
    assert torch.equal(bits(v8), as_columns(q8))
    assert_same_values(residual, rounded((x.float() - q8.float()) * 16))


@pytest.mark.parametrize(("block", "warps", "dim", "dtype"), SHAPES)
def test_gradient(block, warps, dim, dtype):
    """dO′8: rows and columns of one tile. The largest |dO′| is a power of two, so that the scale is exact."""
    from hf_geoscale.kernels.quantize_gradient import quantize_gradient_kernel

    x, one = drawn(dim, dtype), torch.ones(HEADS, device=DEVICE)
    row_sum = torch.ones(1, HEADS, LENGTH, device=DEVICE)
    row_sum[:, :, 5] = 0  # a row that saw no key
    rows, columns = empty(1, HEADS, LENGTH, dim, dtype=E4M3), empty(1, HEADS, dim, PADDED, dtype=E4M3)
    of_rows, of_padded = empty(2, HEADS * LENGTH), empty(3, HEADS * PADDED)
    range_ = torch.full((1, HEADS, 1, 2), LARGEST, device=DEVICE)
    quantize_gradient_kernel[HEADS, PADDED // block](
        x, x, row_sum, row_sum, range_, one, one, one, rows, columns, *of_rows, *of_padded, empty(HEADS, 4), *x.stride(),
        *x.stride(), HEADS, HEADS, LENGTH, PADDED, 1, 0.125, 1.0, GROUP, dim, padded_dim(dim), True, block, num_warps=warps,
    )  # fmt: skip
    folded = x.float() * (row_sum > 0).unsqueeze(-1)
    assert_same_values(rows, rounded(folded * (FORMAT.max / LARGEST)))
    assert torch.equal(bits(columns), as_columns(rows))


@pytest.mark.parametrize(
    ("block", "warps", "dim"),
    [pytest.param(*USUAL, dim, id=f"dim {dim}") for dim in (16, 80, 128, 256)]
    + [pytest.param(*s, 128, id=f"{s[0]} rows, {s[1]} warps", marks=pytest.mark.gpu) for s in OTHERS],
)
def test_transposed(block, warps, dim):
    """Bytes of every value, as they are: columns of q8 and of k8 in both orders, rows of v8."""
    from hf_geoscale.kernels.quantize import transpose_kernel

    generator = torch.Generator().manual_seed(dim)
    drawn_bytes = torch.randint(256, (3, 1, HEADS, LENGTH, dim), generator=generator, dtype=torch.uint8).to(DEVICE)
    q8, k8, v8_rows = (x.view(E4M3) for x in drawn_bytes)
    for paired in (False, True):
        columns = [empty(1, HEADS, dim, PADDED, dtype=E4M3) for _ in range(3)]
        found = empty(1, HEADS, LENGTH, dim, dtype=E4M3)
        v8 = as_columns(v8_rows).contiguous().view(E4M3)
        transpose_kernel[3 * HEADS, PADDED // block](
            q8, k8, k8, v8, *columns, found, 1, HEADS, HEADS, LENGTH, PADDED, LENGTH, PADDED, dim, padded_dim(dim), True,
            paired, block, num_warps=warps,
        )  # fmt: skip
        assert torch.equal(bits(columns[0]), as_columns(q8))
        assert torch.equal(bits(columns[1]), as_columns(k8, paired))
        assert torch.equal(bits(columns[2]), as_columns(k8))
        assert torch.equal(bits(found), bits(v8_rows))
