"""Spectral norms of attention projections, bounded from both sides.

A scale may depend only on an *upper* bound: power iteration approaches a spectral norm from below, so it serves
for monitoring. Both sides run in float64 on the weights' device, batched over heads, and never form a d×d matrix.
Shapes use H heads, D head dimension, d input width; Hq and Hkv query and key/value heads.
"""

import math

import torch
from torch import Tensor

SQUARINGS = 7
"""Repeated squarings of a Gram matrix: p = 2⁷ = 128, so sigma_upper ≤ D^(1/256)·σ (1.9 % high at D = 128)."""

SQUARINGS_PER_TRACE = 4
"""Squarings between two divisions by the trace, which leaves λ_max ≥ 1/D: four of them keep it above D⁻¹⁶, 2⁻¹²⁸ at D = 256."""

ROUNDING_ALLOWANCE = 2.0**-40
"""Relative widening of upper bounds for float64 round-off: D·d·2⁻⁵³ stays below it up to D·d = 8192."""

COLD_ROUNDS = 24
"""Power-iteration rounds from a random start (a guess; on random heads they reach 0.96 σ and more)."""

WARM_ROUNDS = 1
"""Rounds from the vector of the last refresh; the weights moved by one optimizer step."""


def gram(
    matrix: Tensor,  # (H, D, d)
) -> Tensor:
    """Gram matrices G = A Aᵀ in float64: (H, D, D)."""
    matrix = matrix.double()
    return matrix @ matrix.mT


def trace_power_bound(
    matrix: Tensor,  # (..., D, D)
    squarings: int = SQUARINGS,
) -> Tensor:
    """Upper bound λ_max(G) ≤ (tr G^p)^(1/p), p = 2^squarings, by repeated squaring.

    Assumes real, non-negative eigenvalues (a Gram matrix, or the product of two); it is not a bound otherwise.
    Every few powers are divided by their trace and the logarithm is kept: with tr G = 1, all λ ≤ 1 ≤ D·λ_max, so nothing that
    matters over- or underflows on the way to the next.

    Returns:
        (...) float64, at most D^(1/p) times the true eigenvalue; 0 for a zero matrix.
    """
    power = matrix.double()
    tiny = torch.finfo(torch.float64).tiny
    log_bound = torch.zeros(power.shape[:-2], dtype=torch.float64, device=power.device)
    for i in range(squarings):
        if i % SQUARINGS_PER_TRACE == 0:
            trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)  # of a zero matrix; NaN stays NaN
            log_bound += trace.log() / 2**i
            power = power / trace[..., None, None]
        if i < squarings - 1:
            power = power @ power
    trace = (power * power.mT).sum((-2, -1))  # the last square needs only its trace
    return (log_bound + trace.clamp_min(tiny).log() / 2**squarings).exp()


def sigma_upper(
    gram_matrix: Tensor,  # (H, D, D)
) -> Tensor:
    """Upper bound of σ(A) per head from its Gram matrix G = A Aᵀ: (H,) float64."""
    return trace_power_bound(gram_matrix).sqrt() * (1 + ROUNDING_ALLOWANCE)


def interaction_sigma_upper(
    gram_q: Tensor,  # (Hq, D, D)
    gram_k: Tensor,  # (Hkv, D, D)
) -> Tensor:
    """Upper bound of σ(A_Qᵀ A_K) per query head, from σ² = λ_max(G_Q G_K): (Hq,) float64.

    Query head h reads key head h // (Hq/Hkv); keys are broadcast, never repeated. With RoPE this norm does **not**
    bound a logit: use `hf_geoscale.geometry.logit_bound` for that.
    """
    heads, dim, _ = gram_q.shape
    grouped = gram_q.view(gram_k.shape[0], -1, dim, dim)
    squared = trace_power_bound(grouped @ gram_k[:, None]).view(heads)
    product = trace_power_bound(gram_q).view_as(grouped[..., 0, 0]) * trace_power_bound(gram_k)[:, None]
    return (squared + ROUNDING_ALLOWANCE * product.reshape(heads)).sqrt()


def start_vectors(heads: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit start vectors (H, d) in float64, the same on every rank and run (generator seed 0)."""
    vectors = torch.randn(heads, width, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vectors, dim=-1).to(device)


def power_iteration(
    matrix: Tensor,  # (H, D, d)
    vectors: Tensor,  # (H, d), unit length
    rounds: int = WARM_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Lower bound of σ(A) per head: v ← Aᵀ(A v), normalised, `rounds` times.

    Returns:
        sigma_lower (H,) = ‖A v‖ and the vectors (H, d) to warm-start the next call with.
    """
    matrix = matrix.double()
    for _ in range(rounds):
        image = matrix @ vectors[..., None]
        vectors = torch.nn.functional.normalize((matrix.mT @ image).squeeze(-1), dim=-1)
    return (matrix @ vectors[..., None]).squeeze(-1).norm(dim=-1), vectors


def interaction_power_iteration(
    matrix_q: Tensor,  # (Hq, D, d)
    matrix_k: Tensor,  # (Hkv, D, d)
    vectors: Tensor,  # (Hq, d), unit length
    rounds: int = WARM_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Lower bound of σ(M), M = A_Qᵀ A_K, per query head: implicit power iteration on Mᵀ M.

    Four matrix-vector products a round; neither M nor repeated keys are ever formed. Source: arXiv 2602.18851 (from its abstract).

    Returns:
        sigma_lower (Hq,) = ‖M v‖ and the vectors (Hq, d) to warm-start the next call with.
    """
    q, k = matrix_q.double(), matrix_k.double()
    heads, kv_heads = q.shape[0], k.shape[0]
    for _ in range(rounds):
        image = _apply_keys(k, vectors)  # A_K v
        image = (q @ (q.mT @ image.view(heads, -1, 1))).squeeze(-1)  # A_Q A_Qᵀ A_K v
        columns = image.view(kv_heads, heads // kv_heads, -1).mT
        vectors = torch.nn.functional.normalize((k.mT @ columns).mT.reshape(heads, -1), dim=-1)  # A_Kᵀ A_Q A_Qᵀ A_K v
    sigma = (q.mT @ _apply_keys(k, vectors).view(heads, -1, 1)).squeeze(-1).norm(dim=-1)
    return sigma, vectors


def _apply_keys(
    matrix_k: Tensor,  # (Hkv, D, d)
    vectors: Tensor,  # (Hq, d)
) -> Tensor:
    """A_K v per query head, (Hq, D): a group's vectors are the columns of one product, so A_K is never expanded."""
    columns = vectors.view(matrix_k.shape[0], -1, vectors.shape[-1]).mT
    return (matrix_k @ columns).mT.reshape(vectors.shape[0], -1)


def looseness(dim: int, squarings: int = SQUARINGS) -> float:
    """Largest factor by which `sigma_upper` can exceed σ: D^(1/2p), p = 2^squarings."""
    return math.exp(math.log(dim) / 2 ** (squarings + 1)) * (1 + ROUNDING_ALLOWANCE)
