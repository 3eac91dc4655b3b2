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

UNIT_ROUNDOFF = 2.0**-8
"""Of BF16, the coarsest dtype a model runs in."""

ROUNDING_MARGIN = 16 * UNIT_ROUNDOFF
"""Relative widening of certificates: roundings whose error is proportional to the vector itself. The path has at most nine
(norm, gain, projection, bias, cos, sin, two products, sum), each at most √2 unit roundoffs of the vector's norm."""


@dataclass(frozen=True)
class Projection:
    """One head-wise affine map y = rotary_factor · R(W(g∘u + β) + b), ‖u‖₂ ≤ √d, R any rotation.

    Where the module computes more than its map (dropout of an adapter, activations cast to 8 bits), the output before R differs
    by e, |e| ≤ excess entry by entry. Then ‖e‖₂ ≤ ‖excess‖₂, and by the triangle inequality every bound grows by that.
    A per-head q/k norm (Qwen3) is the case W = I, d = D: see `Projection.of_head_norm`.
    """

    weight: Tensor  # (H, D, d)
    norm_gain: Tensor | None = None  # (d,) g; Gemma's is 1 + weight
    norm_shift: Tensor | None = None  # (d,) β; None for RMSNorm
    bias: Tensor | None = None  # (H, D) b
    rotary_factor: float = 1.0  # attention factor of YaRN and its kin, multiplied into cos and sin
    excess: Tensor | None = None  # (H, D) bound of |output − (W x + b)|; None: rounding to BF16 only

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

    def offset_rounding(self) -> Tensor:
        """Bound of what BF16 does to W β + b, entry by entry: unit roundoff · (4·|W||β| + 2·|b|): (H, D) float64.

        Four roundings reach W β (the norm's output, its cast, the cast of W, the product) and two reach b (its cast, the sum).
        """
        weight = self.weight.detach()
        error = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        if self.norm_shift is not None:
            error = error + 4 * (weight.double().abs() @ self.norm_shift.detach().double().abs())
        if self.bias is not None:
            error = error + 2 * self.bias.detach().double().abs()
        return error * (UNIT_ROUNDOFF * self.rotary_factor)

    def deviation(self) -> Tensor:
        """rotary_factor · excess, 0 where there is none: (H, D) float64."""
        if self.excess is None:
            return torch.zeros(self.weight.shape[:2], dtype=torch.float64, device=self.weight.device)
        return self.excess.detach().double() * self.rotary_factor


def norm_bound(
    projection: Projection,
    matrix: Tensor,  # (H, D, d) projection.matrix()
    sigma: Tensor,  # (H,) upper bound of σ(A)
) -> Tensor:
    """Certificate N = (√d·σ(A) + ‖c‖₂ + rounding + ‖excess‖)·(1 + margin): (H,) float64. No entry of the rotated output exceeds it.

    `rounding` holds the BF16 errors that do not shrink when the vector does: casting W (unit roundoff · √d·‖A‖_F), and the
    shift and the bias where they cancel against each other or against W's rows (see `Projection.offset_rounding`).
    """
    root = math.sqrt(matrix.shape[-1])
    bound = root * (sigma + UNIT_ROUNDOFF * matrix.flatten(1).norm(dim=-1))
    if projection.has_offset:
        bound = bound + projection.offset().norm(dim=-1) + projection.offset_rounding().norm(dim=-1)
    if projection.excess is not None:
        bound = bound + projection.deviation().norm(dim=-1)
    return bound * (1 + ROUNDING_MARGIN)


def operand_bound(projection: Projection) -> Tensor:
    """Certificate N of one projection, straight from its weights: (H,) float64. See `norm_bound`."""
    matrix = projection.matrix()
    return norm_bound(projection, matrix, sigma_upper(gram(matrix)))


def entry_bound(projection: Projection) -> Tensor:
    """Bound of |y_c| where nothing mixes the channels: √d·‖row c of A‖₂ + |c_c|, widened. (H, D) float64.

    Not valid after RoPE or a Hadamard mix; there use `norm_bound`.
    """
    matrix = projection.matrix()
    rows = math.sqrt(matrix.shape[-1]) * matrix.norm(dim=-1) + projection.offset().abs()
    return (rows + projection.offset_rounding() + projection.deviation()) * (1 + ROUNDING_MARGIN)


def logit_bound(
    q_bound: Tensor,  # (Hq,)
    k_bound: Tensor,  # (Hkv,)
    softmax_scale: float,
) -> Tensor:
    """Certificate |q·k|·softmax_scale ≤ softmax_scale·N_Q·N_K per query head, RoPE at any offset included: (Hq,)."""
    return softmax_scale * q_bound * k_bound.repeat_interleave(q_bound.shape[0] // k_bound.shape[0])
