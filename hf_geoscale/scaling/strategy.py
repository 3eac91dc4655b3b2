"""Where FP8 scales come from: the protocol that geometry, delayed and current scaling share."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..geometry import LayerGeometry


@dataclass(frozen=True)
class QuantScales:
    """Factors real → FP8 of one layer, float32 on the operands' device."""

    q: Tensor  # (Hq,)
    k: Tensor  # (Hkv,)
    v: Tensor  # (Hkv,)
    logit: Tensor | None = None  # (Hq,) where logits are quantised too

    def to(self, device: torch.device) -> "QuantScales":
        logit = None if self.logit is None else self.logit.to(device)
        return QuantScales(self.q.to(device), self.k.to(device), self.v.to(device), logit)


class CallOperands(Protocol):
    """One attention call, as a strategy may look at it. Only current scaling looks at more than device and heads."""

    @property
    def device(self) -> torch.device: ...

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key/value heads."""

    @property
    def softcap(self) -> float | None:
        """Cap of the logits, cap·tanh(S/cap), in real units; None without one."""

    def amax(self) -> dict[str, Tensor]:
        """Largest magnitude of "q" (Hq,), "k" and "v" (Hkv,), real units, as they are quantised (after mixing)."""

    def logit_amax(self, scales: QuantScales) -> Tensor:
        """Largest |logit| (Hq,), after any soft cap, that these scales of q, k, v lead to; a whole attention call."""


class ScalingStrategy(Protocol):
    """One layer's source of scales. Called in this order: refresh (new weights), quant_scales (each call), observe."""

    observes: bool
    """Whether `observe` wants to be called."""

    needs_interaction: bool
    """Whether `refresh` needs the worst-case logit of the interaction."""

    def refresh(self, geometry: LayerGeometry) -> None:
        """New weights with these bounds."""

    def quant_scales(self, call: CallOperands) -> QuantScales:
        """Scales for this call, known before any operand is cast."""

    def observe(self, amax: dict[str, Tensor]) -> None:
        """Largest magnitudes of this call in real units, as `CallOperands.amax`; "logit", (Hq,), with quantised logits."""


__all__ = ["CallOperands", "QuantScales", "ScalingStrategy"]
