"""The geometry of one attention layer: all bounds of one refresh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .certificates import Projection, logit_bound, norm_bound
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
    sigma_lower: Tensor  # (Hq,) of the interaction A_Qᵀ A_K, without RoPE
    sigma_upper: Tensor  # (Hq,)
    worst_case_logit: Tensor  # (Hq,) B₁ = σ·‖u‖²·softmax_scale of arXiv 2602.18851; not RoPE-safe
    vectors: Tensor  # (Hq, d) warm start of the next refresh
    max_weight_drift: Tensor  # () see `weight_drift_budget`


def weight_drift_budget(
    projection: Projection,
    matrix: Tensor,  # (H, D, d)
    sigma: Tensor,  # (H,)
    bound: Tensor,  # (H,)
    headroom: float,
) -> Tensor:
    """Largest movement m of any single weight that cannot carry the operand past `headroom` × its bound: ().

    Moving every entry of W, g, β and b by at most m moves A by at most m·(√(D·d)·(max|g| + m) + σ(W)) and c by at most
    m·(√(D·d)·(‖β‖ + √d·m) + √d·σ(W) + √D). σ(W) ≤ ‖W‖_F. Solved with m ≤ 1, which any trained weight satisfies.
    """
    heads, dim, width = matrix.shape
    weight = projection.weight.detach().double()
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
    return ((headroom - 1) * bound / (slope * projection.rotary_factor)).amin().clamp(max=1.0)


def measure_layer(
    query: Projection,
    key: Projection,
    value: Projection,
    softmax_scale: float,
    vectors: Tensor | None = None,  # (Hq, d) of the last refresh
    headroom: float = 1.0,
) -> LayerGeometry:
    """Bounds of one layer from its three projections.

    Args:
        softmax_scale: factor on q·k, dimensionless (usually D^-½).
        vectors: warm start; None starts cold.
        headroom: factor the scales leave above the certificates, for `max_weight_drift`.
    """
    matrices = [p.matrix() for p in (query, key, value)]
    offsets = [p.offset() for p in (query, key, value)]
    grams = [gram(m) for m in matrices]
    sigmas = [sigma_upper(g) for g in grams]
    bounds = [norm_bound(s, o, m.shape[-1]) for s, o, m in zip(sigmas, offsets, matrices, strict=True)]
    drift = [
        weight_drift_budget(p, m, s, b, headroom)
        for p, m, s, b in zip((query, key, value), matrices, sigmas, bounds, strict=True)
    ]
    # An offset is one more column: A u + c = [A c][u 1]ᵀ, and ‖[u 1]‖² ≤ d + 1.
    augmented = [torch.cat([m, o[..., None]], dim=-1) for m, o in zip(matrices[:2], offsets[:2], strict=True)]
    width = matrices[0].shape[-1] + 1
    rounds = WARM_ROUNDS
    if vectors is None or vectors.shape != (augmented[0].shape[0], width):
        vectors, rounds = start_vectors(augmented[0].shape[0], width), COLD_ROUNDS
    lower, vectors = interaction_power_iteration(*augmented, vectors.to(matrices[0].device), rounds)
    upper = interaction_sigma_upper(*(gram(m) for m in augmented))
    q_bound, k_bound, v_bound = bounds
    return LayerGeometry(
        q_bound=q_bound,
        k_bound=k_bound,
        v_bound=v_bound,
        logit_bound=logit_bound(q_bound, k_bound, softmax_scale),
        sigma_lower=lower,
        sigma_upper=upper,
        worst_case_logit=upper * width * softmax_scale,
        vectors=vectors,
        max_weight_drift=torch.stack(drift).amin(),
    )
