"""Current scaling: a scale from the largest magnitude of this very tensor. A rival: later tokens reach earlier ones through it."""

from torch import Tensor

from ..geometry import LayerGeometry
from .formats import E4M3
from .strategy import CallOperands, QuantScales

SMALLEST_AMAX = 2.0**-60
"""Least magnitude that still sets a scale; below it everything quantises to 0 anyway."""

ROUND_OFF = 1 - 2.0**-20
"""So that float32 round-off in x·quant_scale does not push the largest value past 448."""


class CurrentScaling:
    """quant_scale = 448 / amax of the tensor, one a tensor. Each call reads its operands once more; logits take a second call."""

    observes, needs_interaction = False, False

    def __init__(self, quantize_logits: bool = False):
        self.quantize_logits = quantize_logits

    def refresh(self, geometry: LayerGeometry) -> None:
        """Weights are of no interest."""

    def quant_scales(self, call: CallOperands) -> QuantScales:
        amax = call.amax()
        scales = QuantScales(_quant_scale(amax["q"]), _quant_scale(amax["k"]), _quant_scale(amax["v"]))
        if not self.quantize_logits:
            return scales
        return QuantScales(scales.q, scales.k, scales.v, _quant_scale(call.logit_amax(scales)))

    def observe(self, amax: dict[str, Tensor]) -> None:
        """Nothing is kept."""


def _quant_scale(amax: Tensor) -> Tensor:
    """(H,) magnitudes → (H,) float32, the same for all heads."""
    return (E4M3.max * ROUND_OFF / amax.detach().float().amax().clamp_min(SMALLEST_AMAX)).expand(amax.shape)
