"""Gain and shift of the norm layers whose output has a bounded norm, before them ‖u‖₂ ≤ √d."""

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .weights import active_module

_ONE_PLUS_WEIGHT = frozenset(
    ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm", "NemotronLayerNorm1P")
)
"""Classes that multiply by 1 + weight (transformers 5.23, their `forward`)."""

_LAYER_NORMS = frozenset(
    (
        "LayerNorm",
        "CohereLayerNorm",
        "Cohere2LayerNorm",
        "Cohere2MoeLayerNorm",
        "CohereCompassLayerNorm",
        "OlmoLayerNorm",
    )
)


def gain_and_shift(norm: Any, where: str) -> tuple[Tensor | None, Tensor | None]:
    """Gain g and shift β of y = g∘u + β, ‖u‖₂ ≤ √d; None for a norm layer without one.

    Classes are known by name along the MRO, since a wrapper (FSDP2) derives a class of its own from the layer's. A numeric
    attribute `offset` (Liger-Kernel) is added to the weight.

    Raises:
        UnsupportedModelError: any other module; tokens after it have no norm bound.
    """
    norm = active_module(norm)
    names = {c.__name__ for c in type(norm).__mro__}
    if not (isinstance(norm, nn.RMSNorm) or names & _LAYER_NORMS or any(name.endswith("RMSNorm") for name in names)):
        raise UnsupportedModelError(
            f"{where} is not a LayerNorm or RMSNorm whose gain we know; tokens after it have no norm bound"
        )
    gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    one_plus = names & _ONE_PLUS_WEIGHT or getattr(norm, "zero_centered_gamma", False)  # the latter: Transformer Engine
    offset = 1.0 if one_plus else float(getattr(norm, "offset", None) or 0.0)
    if gain is not None and offset:
        gain = gain.detach().double() + offset
    return gain, shift
