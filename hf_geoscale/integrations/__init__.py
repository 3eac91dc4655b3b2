"""Hugging Face: families, patching, masks, callback."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import by_name  # noqa: F401 (registers the attention)
from .families import FAMILIES
from .patched import geoscale_layers, patched_layers
from .patching import patch_model, unpatch_model
from .report import GeometryReport, geometry_report
from .scales import load_scaling_state_dict, refresh_scales, scaling_state_dict

if TYPE_CHECKING:
    from .callback import GeoScaleCallback as GeoScaleCallback
    from .qk_clip import QKClip as QKClip
    from .quack import QuacK as QuacK

# Callbacks import the Trainer, and with it every training library that is installed: only for whoever asks for one.
_CALLBACKS = {"GeoScaleCallback": "callback", "QKClip": "qk_clip", "QuacK": "quack"}

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


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_CALLBACKS[name]}", __name__), name)
