"""The geometry of one attention layer: all bounds of one refresh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .certificates import ROUNDING_MARGIN, Projection, logit_bound, norm_bound
from .spectral import (
    COLD_ROUNDS,
    WARM_ROUNDS,
    gram,
    interaction_power_iteration,
    interaction_sigma_upper,
    sigma_upper,
    start_vectors,
)


@dataclass(frozen=True)
class LayerGeometry:
    """Bounds of one layer, float64, on the weights' device. Bounds hold for every input (see `certificates`)."""

    q_bound: Tensor  # (Hq,)
    k_bound: Tensor  # (Hkv,)
    v_bound: Tensor  # (Hkv,)
    logit_bound: Tensor  # (Hq,)
    sigma_lower: Tensor  # (Hq,) of the interaction A_Qᵀ A_K, without RoPE; tracked for monitoring
    vectors: Tensor  # (Hq, d) warm start of the next refresh
    max_weight_drift: float  # see `weight_drift_budget`; 0 without headroom
    worst_case_logit: Tensor | None = None  # (Hq,) B₁, where it was asked for; bounds a logit only without RoPE


def augment(
    matrix: Tensor,  # (H, D, d)
    offset: Tensor,  # (H, D)
) -> Tensor:
    """[A c], so that A u + c = [A c][u 1]ᵀ and ‖[u 1]‖² ≤ d + 1: (H, D, d + 1)."""
    return torch.cat([matrix, offset[..., None]], dim=-1)


def weight_drift_budget(
    projection: Projection,
    bound: Tensor,  # (H,) its certificate
    headroom: float,
) -> Tensor:
    """Largest movement m of any single weight that cannot carry the operand past `headroom` × its bound: ().

    Moving every entry of W, g, β and b by at most m moves A by at most m·(√(D·d)·(max|g| + m) + σ(W)) and c by at most
    m·(√(D·d)·(‖β‖ + √d·m) + √d·σ(W) + √D). σ(W) ≤ ‖W‖_F. Solved with m ≤ 1, which any trained weight satisfies. The
    rounding terms of the certificate move by at most four unit roundoffs of that, and the margin multiplies all. 0 with an
    excess: adapters move W by products of weights, and what casts add moves too.
    """
    if projection.excess is not None:
        return bound.new_zeros(())
    weight = projection.weight.detach().double()
    _, dim, width = weight.shape
    gain = torch.ones((), dtype=torch.float64, device=weight.device)
    if projection.norm_gain is not None:
        gain = projection.norm_gain.detach().double().abs().amax()
    shift = torch.zeros_like(gain)
    if projection.norm_shift is not None:
        shift = projection.norm_shift.detach().double().norm()
    weight_norm = weight.flatten(1).norm(dim=-1)
    spread = (dim * width) ** 0.5
    slope = width**0.5 * (spread * (gain + 1) + weight_norm)
    if projection.norm_shift is not None or projection.bias is not None:
        slope = slope + spread * (shift + width**0.5) + width**0.5 * weight_norm + dim**0.5
    slope = slope * (1 + 2 * ROUNDING_MARGIN) * projection.rotary_factor
    return ((headroom - 1) * bound / slope).amin().clamp(max=1.0)


def measure_layer(
    query: Projection,
    key: Projection,
    value: Projection,
    softmax_scale: float,
    vectors: Tensor | None = None,  # (Hq, d) of the last refresh
    headroom: float = 1.0,
    interaction: bool = False,
) -> LayerGeometry:
    """Bounds of one layer from its three projections.

    Args:
        softmax_scale: factor on q·k, dimensionless (usually D^-½).
        vectors: warm start; None starts cold.
        headroom: factor the scales leave above the certificates, for `max_weight_drift`.
        interaction: also measure `worst_case_logit`.
    """
    projections = (query, key, value)
    matrices = [p.matrix() for p in projections]
    heads = [m.shape[0] for m in matrices]
    sigmas = sigma_upper(torch.cat([gram(m) for m in matrices])).split(heads)
    bounds = [norm_bound(p, m, s) for p, m, s in zip(projections, matrices, sigmas, strict=True)]
    drift = (
        [weight_drift_budget(p, b, headroom) for p, b in zip(projections, bounds, strict=True)] if headroom > 1 else []
    )
    matrix_q, matrix_k = matrices[:2]
    if query.has_offset or key.has_offset:
        matrix_q, matrix_k = augment(matrix_q, query.offset()), augment(matrix_k, key.offset())
    width, rounds = matrix_q.shape[-1], WARM_ROUNDS
    if matrix_k.shape[-1] != width:
        raise ValueError(f"q and k must see the same token, got widths {width} and {matrix_k.shape[-1]}")
    if vectors is None or vectors.shape != (heads[0], width):
        vectors, rounds = start_vectors(heads[0], width), COLD_ROUNDS
    lower, vectors = interaction_power_iteration(matrix_q, matrix_k, vectors.to(matrix_q.device), rounds)
    q_bound, k_bound, v_bound = bounds
    return LayerGeometry(
        q_bound=q_bound,
        k_bound=k_bound,
        v_bound=v_bound,
        logit_bound=logit_bound(q_bound, k_bound, softmax_scale),
        sigma_lower=lower,
        vectors=vectors,
        max_weight_drift=min(map(float, drift), default=0.0),
        worst_case_logit=measure_interaction(query, key, softmax_scale)[1] if interaction else None,
    )


def measure_interaction(query: Projection, key: Projection, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Upper bound of σ(A_Qᵀ A_K) and B₁ = σ·‖u‖²·softmax_scale of arXiv 2602.18851, both (Hq,) float64.

    With an offset the matrices gain it as a column and ‖[u 1]‖² ≤ d + 1. B₁ bounds a logit only without RoPE.
    """
    matrix_q, matrix_k = query.matrix(), key.matrix()
    if query.has_offset or key.has_offset:
        matrix_q, matrix_k = augment(matrix_q, query.offset()), augment(matrix_k, key.offset())
    sigma = interaction_sigma_upper(gram(matrix_q), gram(matrix_k))
    return sigma, sigma * matrix_q.shape[-1] * softmax_scale
