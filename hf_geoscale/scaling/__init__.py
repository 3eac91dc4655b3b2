"""FP8 formats and the sources of scales."""

from .formats import E4M3, E5M2, FP8Format, count_overflow, saturating_cast, sqnr_db
from .strategy import GeometryScaling, QuantScales, ScalingStrategy

__all__ = [
    "E4M3",
    "E5M2",
    "FP8Format",
    "GeometryScaling",
    "QuantScales",
    "ScalingStrategy",
    "count_overflow",
    "saturating_cast",
    "sqnr_db",
]
