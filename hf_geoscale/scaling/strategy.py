"""Where FP8 scales come from: the protocol, and the strategy that reads them off the weights.

Delayed scaling (amax history) and current scaling (amax of this tensor) fit the same protocol: they ignore `refresh`
and look at `observe` or at the operands instead.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..geometry import LayerGeometry
from .formats import E4M3

SMALLEST_BOUND = 2.0**-60
"""Floor of a certificate, so that all-zero weights give a finite quant_scale (any value below 2⁻⁶⁰ quantises to 0 anyway)."""


@dataclass(frozen=True)
class QuantScales:
    """Factors real → FP8 of one layer, float32 on the operands' device."""

    q: Tensor  # (Hq,)
    k: Tensor  # (Hkv,)
    v: Tensor  # (Hkv,)

    def to(self, device: torch.device) -> "QuantScales":
        return QuantScales(self.q.to(device), self.k.to(device), self.v.to(device))


class ScalingStrategy(Protocol):
    """One layer's source of scales. Called in this order: refresh (new weights), quant_scales (each call), observe."""

    def refresh(self, geometry: LayerGeometry) -> None:
        """New weights with these bounds."""

    def quant_scales(
        self,
        query: Tensor,  # (B, Hq, Lq, D)
        key: Tensor,  # (B, Hkv, Lk, D)
        value: Tensor,  # (B, Hkv, Lk, D)
    ) -> QuantScales:
        """Scales for this call, known before any operand is cast."""

    def observe(
        self,
        q_amax: Tensor,  # (Hq,)
        k_amax: Tensor,  # (Hkv,)
        v_amax: Tensor,  # (Hkv,)
    ) -> None:
        """Largest magnitude of each operand in this call, real units, after mixing."""


class GeometryScaling:
    """quant_scale = 448 / (headroom · certificate): depends on the weights alone, so no input overflows it.

    Args:
        headroom: ≥ 1, room for the weights to move before the next refresh.
    """

    def __init__(self, headroom: float = 1.0):
        self.headroom = headroom
        self.scales: QuantScales | None = None

    def refresh(self, geometry: LayerGeometry) -> None:
        limit = E4M3.max / self.headroom
        q, k, v = (
            (limit / bound.clamp_min(SMALLEST_BOUND)).float()
            for bound in (geometry.q_bound, geometry.k_bound, geometry.v_bound)
        )
        self.scales = QuantScales(q, k, v)

    def quant_scales(self, query: Tensor, key: Tensor, value: Tensor) -> QuantScales:
        if self.scales is None:
            raise RuntimeError("GeometryScaling has no scales yet: call refresh(geometry) before the first forward")
        if self.scales.q.device != query.device:
            self.scales = self.scales.to(query.device)
        return self.scales

    def observe(self, q_amax: Tensor, k_amax: Tensor, v_amax: Tensor) -> None:
        """Nothing: no activation ever reaches a scale."""
