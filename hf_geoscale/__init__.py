"""FP8 attention for Hugging Face Transformers whose scales come from the geometry of the weights."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import registration

__version__ = "0.1.0"

# Public names and their homes; imported on first use, so that `import hf_geoscale` costs nothing.
_HOMES = {
    "EarlyWarning": "stability",
    "FragilityCallback": "integrations.fragility_callback",
    "GeoScaleCallback": "integrations",
    "GeoScaleConfig": "config",
    "NonFiniteWeightsError": "errors",
    "QKClip": "integrations",
    "QuacK": "integrations",
    "SpanScaling": "stability.span",
    "UnsupportedAttentionError": "errors",
    "UnsupportedModelError": "errors",
    "NormEpsilonController": "stability",
    "fp8_attention": "kernels",
    "fragility_report": "integrations.fragility",
    "geometry_report": "integrations",
    "patch_model": "integrations",
    "refresh_scales": "integrations",
    "scale_span_gradients": "stability.span",
    "tune_tiles": "kernels.tuning",
    "unpatch_model": "integrations",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .config import GeoScaleConfig as GeoScaleConfig
    from .errors import NonFiniteWeightsError as NonFiniteWeightsError
    from .errors import UnsupportedAttentionError as UnsupportedAttentionError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .integrations import GeoScaleCallback as GeoScaleCallback
    from .integrations import QKClip as QKClip
    from .integrations import QuacK as QuacK
    from .integrations import geometry_report as geometry_report
    from .integrations import patch_model as patch_model
    from .integrations import refresh_scales as refresh_scales
    from .integrations import unpatch_model as unpatch_model
    from .integrations.fragility import fragility_report as fragility_report
    from .integrations.fragility_callback import FragilityCallback as FragilityCallback
    from .kernels import fp8_attention as fp8_attention
    from .kernels.tuning import tune_tiles as tune_tiles
    from .stability import EarlyWarning as EarlyWarning
    from .stability import NormEpsilonController as NormEpsilonController
    from .stability.span import SpanScaling as SpanScaling
    from .stability.span import scale_span_gradients as scale_span_gradients


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])


registration.install()  # attn_implementation="geoscale" works after `import hf_geoscale` alone
