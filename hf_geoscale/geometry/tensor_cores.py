"""Spectral norms from above in 16-bit products with float32 sums, every rounding bounded: what makes a refresh cheap on a GPU.

Two steps, each with a worst-case allowance instead of float64. u₈ = 2⁻⁸ and u₁₁ = 2⁻¹¹ are the unit roundoffs of BF16 and FP16.

1. Gram: Â = bf16(W diag(g)), so |A − Â| ≤ u₈|A| entry by entry and σ(A) ≤ σ(Â) + u₈‖A‖_F. Products of two BF16 numbers are exact in
   float32; K of them, summed in any order and rounded or truncated at each addition, are off by at most K·2⁻²³·Σ|products|
   (nearly). Hence Ĝ = Â Âᵀ + Δ, ‖Δ‖_F ≤ ε‖Â‖_F², ε = (K + C)·2⁻²³ for C partial sums of K products, and ‖Â‖_F² ≤ tr Ĝ/(1 − ε).
2. Trace power: S₀ = fp16(Ĝ/t₀), Qₖ = Sₖ Sₖᵀ in float32, Sₖ₊₁ = fp16(Qₖ/tₖ₊₁) with tₖ the Frobenius norms. By the triangle
   inequality σ(Sₖ)² ≤ σ(Qₖ) + a, σ(Qₖ) ≤ tₖ₊₁(σ(Sₖ₊₁) + e), and σ(Q) ≤ ‖Q‖_F in the end. σ(S) ≥ ‖S‖_F/√D ≈ 1/√D turns both
   allowances into factors: σ(Ĝ) ≤ t₀ t₁^½ t₂^¼ … · (1 + ê)²(1 + â). No step needs Ĝ to be symmetric or its eigenvalues ≥ 0.

Assumes matrix units that sum at no less than single precision (PTX ISA, mma and wgmma with .f32 accumulators), rounding as they
like. TF32 reads BF16 and FP16 numbers exactly, so no flag of torch can lower a bound.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .spectral import SQUARINGS

SUM_WIDTH = 1024
"""Most products summed in one float32; rows are cut into parts of equal length no longer than that, where they can be."""

ADDITION = 2.0**-23
"""Relative error of one float32 addition that may truncate."""

BF16_ROUNDOFF = 2.0**-8 * (1 + 2.0**-10)
"""Of bf16(w·g), the product rounded to float32 before; 1 − 2⁻⁸ in a denominator is covered by `SLACK`."""

FP16_ROUNDOFF, FP16_UNDERFLOW = 2.0**-11, 2.0**-25
"""Relative error of a normal FP16 number, absolute error of a subnormal one."""

SMALLEST_NORM = 2.0**-100
"""Norms of Gram matrices below it are taken for it, so that nothing is divided by 0."""

UNDERFLOW = 2.0**-49
"""Added to σ: covers σ² ≤ 2⁻¹⁰⁰ (`SMALLEST_NORM`) and D·d ≤ 2²⁶ products and entries of Â that float32 and BF16 flush to 0."""

SLACK = 1.01
"""Factor on allowances for what is of second order in them (K·2⁻²³ ≤ 2⁻⁷ for K ≤ 2¹⁶)."""


class MatrixKernels(Protocol):
    """Kernels that do what this module does in torch, for all matrices in one launch each."""

    def takes(self, dim: int, device: torch.device) -> bool:
        """Whether the others run for matrices of this size there."""

    def can_read(self, weight: Tensor, factors: Tensor | None) -> bool:
        """Whether `grams` reads these, (H, D, d) and (d,)."""

    def grams(self, rows: Sequence[tuple[Tensor, Tensor | None, int]], out: Tensor, part: int) -> None:
        """Write Ĝ of each weight with its gain, at its place in `out` (N, D, D) float32, at most `part` products in a sum."""

    def tables(self, rows: Sequence[tuple[Tensor, Tensor | None, int]], device: torch.device) -> Any:
        """Where these lie, for `grams_of`. Keeps none of them alive."""

    def is_current(self, tables: Any) -> bool:
        """Whether launches from here on come after what `tables` uploaded."""

    def grams_of(self, tables: Any, out: Tensor, part: int) -> None:
        """`grams` of what lies there now."""

    def norm_bounds(self, grams: Tensor, coefficients: Tensor, squarings: int) -> Tensor:
        """a·(√(L·λ + ε·tr G) + u) + b·√((1 + ε)·tr G), (N,) float64, from (N, D, D) and L, ε, u, a, b: (N, 5) float64.

        L·λ is `half_trace_power_bound`, L `half_looseness`.
        """

    def power_iteration(self, gram_q: Tensor, gram_k: Tensor, vectors: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """As `spectral.gram_power_iteration`."""


@lru_cache
def partition(width: int) -> tuple[int, int]:
    """(C, K): rows of `width` = C·K entries in as few equal parts as keep K ≤ SUM_WIDTH; one part where nothing divides it."""
    for parts in range(math.ceil(width / SUM_WIDTH), 65):
        if width % parts == 0:
            return parts, width // parts
    return 1, width


@lru_cache
def sum_error(width: int) -> float:
    """ε of a Gram matrix of rows of this width: ‖Ĝ − Â Âᵀ‖_F ≤ ε‖Â‖_F², in equal parts or in parts of `SUM_WIDTH`."""
    parts = max(sum(partition(width)), min(width, SUM_WIDTH) + math.ceil(width / SUM_WIDTH))
    return SLACK * parts * ADDITION


def products(
    matrix: Tensor,  # (N, D, K) BF16 or FP16
) -> Tensor:
    """M Mᵀ with exact products and float32 sums: (N, D, D) float32."""
    # The flag lets cuBLAS add FP16 products in FP16.
    in_half = matrix.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    if matrix.is_cuda and not in_half and _bmm_widens():
        return torch.bmm(matrix, matrix.mT, out_dtype=torch.float32)
    matrix = matrix.float()
    return matrix @ matrix.mT


@lru_cache
def _bmm_widens() -> bool:
    """Whether this torch multiplies 16-bit matrices into float32."""
    return "dtype" in torch.ops.aten.bmm.overloads()


def scaled_rows(
    weight: Tensor,  # (H, D, d)
    gain: Tensor | None,  # (d,)
    out: Tensor,  # (H, D, C, K) BF16, C·K = d, any strides
) -> None:
    """Write Â = bf16(W diag(g)), its rows cut into C parts. Reads the weight once and makes no other copy of it."""
    weight = weight.detach().view(out.shape)
    if gain is None:
        out.copy_(weight)
    else:
        gain = gain.detach().view(out.shape[2:])
        if weight.dtype == torch.float16:  # a product of two float16 numbers would be rounded to float16 first
            gain = gain.float()
        torch.mul(weight, gain, out=out)


def half_trace_power_bound(
    gram: Tensor,  # (N, D, D) float32
    squarings: int = SQUARINGS,
) -> Tensor:
    """Upper bound of σ(G), (tr G^p)^(1/p) with p = 2^squarings and FP16 factors, rounding included: (N,) float64.

    At most D^(1/p) times σ, times `half_looseness`. NaN stays NaN; what overflows float32 becomes NaN.
    """
    norms, power, half = [], gram, torch.empty_like(gram, dtype=torch.float16)
    for i in range(squarings):
        norm = torch.linalg.vector_norm(power, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp_min_(
            SMALLEST_NORM
        )
        norms.append(norm)
        if i < squarings - 1:
            torch.mul(power, norm.reciprocal(), out=half)
            power = products(half)
    log_norms = torch.cat(norms).view(squarings, -1).log_()
    return torch.exp(_exponents(squarings, gram.device) @ log_norms) * half_looseness(gram.shape[-1])


@lru_cache(maxsize=64)
def _exponents(squarings: int, device: torch.device) -> Tensor:
    """1, ½, ¼, …: (squarings,) float64."""
    with torch.inference_mode(False):
        return torch.exp2(-torch.arange(squarings, dtype=torch.float64, device=device))


@lru_cache
def half_looseness(dim: int) -> float:
    """(1 + ê)²(1 + â) of the module's docstring: 1.3 % at D = 128."""
    rounding = SLACK * math.sqrt(dim) * (FP16_ROUNDOFF + dim * FP16_UNDERFLOW)
    addition = SLACK**2 * dim**2 * 1.03 * ADDITION
    return (1 + rounding) ** 2 * (1 + addition) * (1 + 2.0**-20)  # the last: norms in float64
