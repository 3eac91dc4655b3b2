"""Hugging Face: families, patching, masks, callback."""

from . import by_name  # noqa: F401 (registers the attention)
from .callback import GeoScaleCallback
from .families import FAMILIES
from .patched import geoscale_layers, patched_layers
from .patching import patch_model, unpatch_model
from .qk_clip import QKClip
from .quack import QuacK
from .report import GeometryReport, geometry_report
from .scales import load_scaling_state_dict, refresh_scales, scaling_state_dict

__all__ = [
    "FAMILIES",
    "GeoScaleCallback",
    "GeometryReport",
    "QKClip",
    "QuacK",
    "geometry_report",
    "geoscale_layers",
    "load_scaling_state_dict",
    "patch_model",
    "patched_layers",
    "refresh_scales",
    "scaling_state_dict",
    "unpatch_model",
]
