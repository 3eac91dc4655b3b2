"""Certificates: what the weights alone promise about q, k, v and the logits, for every input.

A token u leaves RMSNorm or LayerNorm (before the gain) with ‖u‖₂ ≤ √d exactly, and a projection maps it to
A u + c with A = W diag(g), c = W β + b. Hence ‖A u + c‖₂ ≤ √d·σ(A) + ‖c‖₂: this survives RoPE and every other
orthogonal mixing of the channels, so it also bounds each entry.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spectral import gram, sigma_upper

ROUNDING_MARGIN = 2.0**-4
"""Relative widening for BF16 activations: 16 unit roundoffs of 2⁻⁸. The path has at most nine roundings (norm, gain,
projection, bias, cos, sin, two products, sum), each at most √2 unit roundoffs of the vector's norm; FP16 and TF32 are finer."""


@dataclass(frozen=True)
class Projection:
    """One head-wise affine map y = rotary_factor · R(W(g∘u + β) + b), ‖u‖₂ ≤ √d, R any rotation.

    A per-head q/k norm (Qwen3) is the case W = I, d = D: see `Projection.of_head_norm`.
    """

    weight: Tensor  # (H, D, d)
    norm_gain: Tensor | None = None  # (d,) g; Gemma's is 1 + weight
    norm_shift: Tensor | None = None  # (d,) β; None for RMSNorm
    bias: Tensor | None = None  # (H, D) b
    rotary_factor: float = 1.0  # attention factor of YaRN and its kin, multiplied into cos and sin

    @classmethod
    def of_head_norm(cls, gain: Tensor, heads: int, rotary_factor: float = 1.0) -> "Projection":
        """The map u ↦ γ∘u that ends a per-head RMSNorm with gain γ: (D,); the projection before it does not matter."""
        weight = torch.diag(gain.detach().double()).expand(heads, -1, -1)
        return cls(weight, rotary_factor=rotary_factor)

    @property
    def has_offset(self) -> bool:
        """Whether c can differ from 0: a norm shift or a bias."""
        return self.norm_shift is not None or self.bias is not None

    def matrix(self) -> Tensor:
        """rotary_factor · W diag(g): (H, D, d) float64."""
        weight = self.weight.detach().double()
        if self.norm_gain is not None:
            weight = weight * self.norm_gain.detach().double()
        return weight * self.rotary_factor

    def offset(self) -> Tensor:
        """rotary_factor · (W β + b): (H, D) float64."""
        weight = self.weight.detach()
        offset = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        if self.norm_shift is not None:
            offset = offset + weight.double() @ self.norm_shift.detach().double()
        if self.bias is not None:
            offset = offset + self.bias.detach().double()
        return offset * self.rotary_factor


def norm_bound(
    sigma: Tensor,  # (H,) upper bound of σ(A)
    offset: Tensor,  # (H, D)
    width: int,
) -> Tensor:
    """Certificate N = (√d·σ(A) + ‖c‖₂)·(1 + margin): no entry of the rotated output exceeds it. (H,) float64."""
    return (math.sqrt(width) * sigma + offset.norm(dim=-1)) * (1 + ROUNDING_MARGIN)


def operand_bound(projection: Projection) -> Tensor:
    """Certificate N of one projection, straight from its weights: (H,) float64. See `norm_bound`."""
    matrix = projection.matrix()
    return norm_bound(sigma_upper(gram(matrix)), projection.offset(), matrix.shape[-1])


def entry_bound(projection: Projection) -> Tensor:
    """Bound of |y_c| where nothing mixes the channels: √d·‖row c of A‖₂ + |c_c|, widened. (H, D) float64.

    Not valid after RoPE or a Hadamard mix; there use `norm_bound`.
    """
    matrix = projection.matrix()
    rows = math.sqrt(matrix.shape[-1]) * matrix.norm(dim=-1) + projection.offset().abs()
    return rows * (1 + ROUNDING_MARGIN)


def logit_bound(
    q_bound: Tensor,  # (Hq,)
    k_bound: Tensor,  # (Hkv,)
    softmax_scale: float,
) -> Tensor:
    """Certificate |q·k|·softmax_scale ≤ softmax_scale·N_Q·N_K per query head, RoPE at any offset included: (Hq,)."""
    return softmax_scale * q_bound * k_bound.repeat_interleave(q_bound.shape[0] // k_bound.shape[0])
