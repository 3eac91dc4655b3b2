"""Hugging Face: families, patching, masks, callback."""

from .callback import GeoScaleCallback
from .families import FAMILIES
from .patching import (
    geoscale_layers,
    load_scaling_state_dict,
    patch_model,
    patched_layers,
    refresh_scales,
    scaling_state_dict,
    unpatch_model,
)
from .qk_clip import QKClip
from .quack import QuacK
from .report import GeometryReport, geometry_report

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
