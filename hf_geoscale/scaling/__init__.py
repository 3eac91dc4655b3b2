"""FP8 formats and the sources of scales."""

from ..config import GeoScaleConfig
from .current import CurrentScaling
from .delayed import DelayedScaling
from .formats import E4M3, E5M2, FP8Format, count_overflow, saturating_cast, sqnr_db
from .geometry import GeometryScaling, refresh_together
from .strategy import CallOperands, QuantScales, ScalingStrategy


def strategy_of(config: GeoScaleConfig, alpha: float | None = None) -> ScalingStrategy:
    """A fresh strategy for one layer; `alpha` is the model's α_min, for bound="rank_aware"."""
    if config.scaling == "delayed":
        return DelayedScaling(config.delayed, config.quantize_logits)
    if config.scaling == "current":
        return CurrentScaling(config.quantize_logits)
    return GeometryScaling(config.headroom, config.quantize_logits, config.bound, alpha, config.auto_alpha)


__all__ = [
    "E4M3",
    "E5M2",
    "CallOperands",
    "CurrentScaling",
    "DelayedScaling",
    "FP8Format",
    "GeometryScaling",
    "QuantScales",
    "ScalingStrategy",
    "count_overflow",
    "refresh_together",
    "saturating_cast",
    "sqnr_db",
    "strategy_of",
]
