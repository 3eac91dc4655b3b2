"""Finding models, and what patched attention modules carry, inside whatever module a caller has."""

import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from .layer import GeoScaleLayer, PatchedLayer

logger = logging.getLogger(__name__)

PATCHED: WeakSet[nn.Module] = WeakSet()
"""Models that `patch_model` was called on, as long as they live."""


def patched_modules(model: nn.Module) -> Iterator[tuple[Any, PatchedLayer]]:
    """Every patched attention module with its state, in the order of the layers; there is none inside another."""
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        layer = module.__dict__.get("geoscale")
        if isinstance(layer, PatchedLayer):
            yield module, layer
        elif module._modules:
            waiting += [child for child in reversed(module._modules.values()) if child is not None]


def patched_layers(model: nn.Module) -> list[PatchedLayer]:
    """States of every patched attention layer, those left to SDPA included; empty for an unpatched model."""
    return [layer for _, layer in patched_modules(model)]


def geoscale_layers(model: nn.Module) -> list[GeoScaleLayer]:
    """States of the attention layers that run in FP8."""
    return [layer for layer in patched_layers(model) if isinstance(layer, GeoScaleLayer)]


def left_out(model: nn.Module) -> dict[nn.Module, PatchedLayer]:
    """Attention modules of patched models that are not patched: they were added since. Each with a state that says so."""
    states = {module: layer for module, layer in patched_modules(model) if isinstance(layer, GeoScaleLayer)}
    homes = {id(layer.site.model): (layer.site.model, layer) for layer in states.values() if layer.site.is_whole}
    found: dict[nn.Module, PatchedLayer] = {}
    for home, layer in homes.values():
        kinds = {type(module) for module, other in states.items() if other.site.model is home}
        for name, module in home.named_modules():
            if type(module) in kinds and module not in states:
                reason = "added after the model was patched; call patch_model(model) again"
                found[module] = PatchedLayer(layer.config, name, layer.family, reason)
    return found


def warn_of_left_out(layers: list[PatchedLayer], added: dict[nn.Module, PatchedLayer]) -> None:
    """Say once that attention modules beside these patched layers are not patched."""
    if added and not layers[0].warned_of_others:
        layers[0].warned_of_others = True
        names = [layer.name for layer in added.values()]
        logger.warning(
            "geoscale: %s (%d of %d layers) was added after patching and does not run in FP8; call patch_model(model) again",
            names[0],
            len(names),
            len(names) + len(layers),
        )


def outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a module that lie in no other one: the module itself, what it wraps, or several side by side."""
    found: list[PreTrainedModel] = []
    seen: set[nn.Module] = set()
    waiting = [module]
    while waiting:
        inner = waiting.pop()
        if inner in seen:
            continue
        seen.add(inner)
        if isinstance(inner, PreTrainedModel):
            found.append(inner)
        else:
            waiting += [child for child in reversed(inner._modules.values()) if child is not None]
    return found


def transformers_model(model: Any, caller: str) -> PreTrainedModel:
    """The model itself, or the one inside a PEFT model of any kind.

    Raises:
        TypeError: anything else, wrappers included.
    """
    found = [model] if isinstance(model, PreTrainedModel) else []
    if type(model).__module__.startswith("peft.") and isinstance(model, nn.Module):
        found = outermost_models(model)
    if len(found) != 1:
        hint = "load it first" if isinstance(model, str) else "patch the base model before wrapping it"
        got = repr(model) if isinstance(model, str) else type(model).__name__
        raise TypeError(f"{caller} expects a PEFT model or a transformers PreTrainedModel, got {got}; {hint}")
    return found[0]


def torch_module(model: Any, caller: str) -> nn.Module:
    """The argument of a function that takes any module with patched models in it. Raises TypeError for anything else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} expects a patched model or a module around one, got {type(model).__name__}")
    return model
