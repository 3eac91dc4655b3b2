"""Rank-aware logit bounds: how far below the worst case logits stay, with a stated probability.

Reconstruction: the body of arXiv 2602.18851 was not available to us. The formulas are our derivation from its abstract and
reproduce its published 8–28× range. They assume token directions uniform on the sphere and no RoPE; real tokens are
neither, so report the observed α beside `alpha_min`.
"""

import math


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def typicality_gamma(rank: int, events: float, failure_prob: float) -> float:
    """Smallest γ > 1 with events · exp(−(r/2)(γ − 1 − ln γ)) ≤ failure_prob, by bisection.

    γ bounds the projected energy of a typical token: P(‖Uᵀx‖² > γ r/d) ≤ exp(−(r/2)(γ − 1 − ln γ)).

    Args:
        rank: r, rank of the interaction (the head dimension D).
        events: number of projected tokens the bound must hold for at once.
        failure_prob: allowed probability that any of them exceeds it, in (0, 1).
    Raises:
        ValueError: a value is not positive, or failure_prob is not below 1.
    """
    _check(rank=rank, events=events, failure_prob=failure_prob)
    if failure_prob >= 1:
        raise ValueError(f"failure_prob is a probability below 1, got {failure_prob}")
    target = max(0.0, 2 / rank * math.log(events / failure_prob))
    low, high = 1.0, 2.0 + 2 * target  # γ − 1 − ln γ ≥ target at `high`
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle - 1 - math.log(middle) < target else (low, middle)
    return high


def alpha_min(
    width: int, rank: int, length: int, heads: int, layers: int, failure_prob: float = 1e-6
) -> tuple[float, float]:
    """Smallest α such that no logit exceeds α·B₁, B₁ = σ(M)·d·softmax_scale, except with probability `failure_prob`.

    α_min = sqrt((2 γ r / d²) · ln(4 L² Hq n_layers / δ)); half of δ is spent on typicality (γ, over L·Hq·n_layers
    projected tokens), half on the L² logits of each head, two-sided.

    Args:
        width, rank: d and r. length: L, tokens. heads, layers: query heads and layers of the model.
    Returns:
        (α_min, γ), both dimensionless.
    Raises:
        ValueError: an argument is not positive.
    """
    _check(width=width, rank=rank, length=length, heads=heads, layers=layers, failure_prob=failure_prob)
    gamma = typicality_gamma(rank, length * heads * layers, failure_prob / 2)
    log_events = math.log(4 * length**2 * heads * layers / failure_prob)
    return math.sqrt(2 * gamma * rank / width**2 * log_events), gamma


def rank_aware_gain(width: int, rank: int, gamma: float) -> float:
    """How many times the rank-aware tail exponent exceeds the rank-agnostic one: d/(γ r)."""
    _check(width=width, rank=rank, gamma=gamma)
    return width / (gamma * rank)
