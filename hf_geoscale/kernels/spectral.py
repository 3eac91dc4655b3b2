"""Spectral norms of many small matrices, a program a matrix: trace powers from above, power iteration from below."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import can_read, grams, grams_of, is_current, shape_of, tables, takes
from .launcher import DirectKernel

__all__ = ["can_read", "grams", "grams_of", "is_current", "norm_bounds", "power_iteration", "tables", "takes"]

NORM_MIN = tl.constexpr(2.0**-100)
"""Norms below it are taken for it, so that nothing is divided by 0."""

TRACE_MAX = tl.constexpr(2.0**127)
"""Traces above it give NaN: their reciprocal would lose its bits in float32."""

FLOAT32_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _frobenius(power):
    """‖power‖_F, at least `NORM_MIN`: rows in float32, their sum in float64."""
    norm = tl.sqrt(tl.sum(tl.sum(power * power, 1).to(tl.float64), 0))
    return tl.where(norm < NORM_MIN, NORM_MIN, norm)  # NaN stays NaN


@DirectKernel
@triton.jit
def norm_bound_kernel(
    p_gram,  # (N, D, D) float32
    p_coefficients,  # (N, 5) float64
    p_bound,  # (N,) float64
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    i, o = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    p_matrix = p_gram + i * (D * D)
    inside = (o < D)[:, None] & (o < D)[None, :]
    gram = tl.load(p_matrix + o[:, None] * D + o[None, :], mask=inside, other=0.0)  # (DP, DP)
    trace = tl.sum(tl.load(p_matrix + o * (D + 1), mask=o < D, other=0.0).to(tl.float64), 0)
    unit = tl.where(trace < NORM_MIN, NORM_MIN, trace)
    power = gram * (1 / unit).to(tl.float32)
    norm = _frobenius(power)
    log_norms, weight = tl.log(unit) + tl.log(norm), 1.0
    for _ in tl.static_range(1, SQUARINGS):
        half = (power * (1 / norm).to(tl.float32)).to(tl.float16)
        power = tl.dot(half, tl.trans(half))
        norm = _frobenius(power)
        weight = weight / 2
        log_norms += weight * tl.log(norm)
    p_own = p_coefficients + 5 * i
    looseness, error, smallest = tl.load(p_own), tl.load(p_own + 1), tl.load(p_own + 2)
    of_sigma, of_frobenius = tl.load(p_own + 3), tl.load(p_own + 4)
    sigma = tl.sqrt(looseness * tl.exp(log_norms) + error * trace) + smallest
    bound = of_sigma * sigma + of_frobenius * tl.sqrt((1 + error) * trace)
    tl.store(p_bound + i, tl.where(trace <= TRACE_MAX, bound, float("nan")))


@DirectKernel
@triton.jit
def power_iteration_kernel(
    p_gram_q,  # (N·Hq, D, D) float32
    p_gram_k,  # (N·Hkv, D, D) float32
    p_vectors,  # (N·Hq, D) float32
    p_sigma,  # (N·Hq,) float64
    p_next,  # (N·Hq, D) float32
    group,  # Hq / Hkv
    rounds,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    head, o = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    inside = (o < D)[:, None] & (o < D)[None, :]
    entries = o[:, None] * D + o[None, :]
    gram_q = tl.load(p_gram_q + head * (D * D) + entries, mask=inside, other=0.0)
    gram_k = tl.load(p_gram_k + (head // group) * (D * D) + entries, mask=inside, other=0.0)
    vector = tl.load(p_vectors + head * D + o, mask=o < D, other=0.0)
    squared, length = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for _ in range(rounds):
        image = tl.sum(gram_k * vector[None, :], 1)  # G_K z
        mapped = tl.sum(gram_q * image[None, :], 1)  # G_Q G_K z
        wide = mapped.to(tl.float64)  # its square may leave the range of float32
        squared, length = tl.sum(wide * image, 0), tl.sum(vector.to(tl.float64) * image, 0)
        norm = tl.sqrt(tl.sum(wide * wide, 0))
        vector = tl.where(norm == 0, vector, (wide / norm).to(tl.float32))
    squared, length = tl.where(squared < 0, 0.0, squared), tl.where(length < FLOAT32_TINY, FLOAT32_TINY, length)
    tl.store(p_sigma + head, tl.sqrt(squared / length))
    tl.store(p_next + head * D + o, vector, mask=o < D)


def norm_bounds(
    grams: Tensor,  # (N, D, D) float32, D ≤ DIM_MAX
    coefficients: Tensor,  # (N, 5) float64: L, ε, u, a, b
    squarings: int,
) -> Tensor:
    """a·(√(L·λ + ε·tr G) + u) + b·√((1 + ε)·tr G) of each Gram matrix G, λ = (tr G^p)^(1/p), p = 2^squarings: (N,) float64.

    Powers as in `geometry.tensor_cores`: X = G/tr G in float32, S₀ = fp16(X/‖X‖_F), Qₖ = Sₖ Sₖᵀ with exact products and float32
    sums, Sₖ₊₁ = fp16(Qₖ/‖Qₖ‖_F), λ from the norms. Beyond what is said there, reciprocals and products with them are rounded to
    float32, four relative errors of at most 2⁻²² before each rounding to FP16, 2⁻¹¹; and a norm, whose error counts in the last
    power only, is off by (D + 2)·2⁻²⁵, to the power of 1/2^(squarings − 1).

    NaN where a matrix holds NaN or Inf, and where a trace exceeds 2¹²⁷.
    """
    count, dim, _ = grams.shape
    bound = grams.new_empty(count, dtype=torch.float64)
    with torch.cuda.device_of(grams):
        norm_bound_kernel[(count,)](grams, coefficients, bound, SQUARINGS=squarings, **shape_of(dim))
    return bound


def power_iteration(
    gram_q: Tensor,  # (N·Hq, D, D) float32, D ≤ DIM_MAX
    gram_k: Tensor,  # (N·Hkv, D, D) float32
    vectors: Tensor,  # (N·Hq, D) float32, z
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """`geometry.spectral.gram_power_iteration`: σ (N·Hq,) float64 and the vectors (N·Hq, D) float32 for the next call.

    Inner products are summed in float64.
    """
    heads, dim = vectors.shape
    sigma, following = vectors.new_empty(heads, dtype=torch.float64), torch.empty_like(vectors)
    group = heads // len(gram_k)
    with torch.cuda.device_of(vectors):
        power_iteration_kernel[(heads,)](gram_q, gram_k, vectors, sigma, following, group, rounds, **shape_of(dim))
    return sigma, following
