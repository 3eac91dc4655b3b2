"""Swap the attention of a model in place, and swap it back."""

import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..config import GeoScaleConfig
from ..errors import UnsupportedModelError
from ..scaling import DelayedScaling
from . import front_end
from .announcement import announce
from .attention import geoscale_attention_forward
from .families import attention_sites
from .front_end import NAME
from .layer import GeoScaleLayer, PatchedLayer, model_alpha_min
from .masks import geoscale_mask
from .refresh import Measurement, RefreshGroup
from .residual import refuse_embeddings
from .sharding import enclosing_modules, refuse_parallelism, refuse_replicas
from .zero3 import pass_by_position, refuse_prepared

logger = logging.getLogger(__name__)

# At import, so that an unpickled patched model finds them in a new process. torch.compile leaves both out of its graphs: they read
# the weights' versions and count calls, which a graph would freeze, and a CUDA graph would replay with old scales.
AttentionInterface.register(NAME, torch.compiler.disable(geoscale_attention_forward))
AttentionMaskInterface.register(NAME, torch.compiler.disable(geoscale_mask))


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


def _replaced_forward(attention: nn.Module) -> str | None:
    """The Python module whose function replaced an attention's forward and calls no attention interface; None if none did.

    Unsloth and its kin do this to transformers' classes. Wrappers, such as accelerate's hooks, and subclasses that call
    `super().forward` still reach the interface.
    """
    forward: Any = inspect.unwrap(attention.forward)
    if isinstance(
        forward, front_end.FusedForward
    ):  # left in somebody's wrapper by an earlier patch; calls the class's own
        return None
    origin = getattr(forward, "__module__", None) or type(forward).__module__
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if origin.startswith("transformers.") or "ALL_ATTENTION_FUNCTIONS" in names or "super" in names:
        return None
    return origin


def _warn_of_replaced_forwards(layers: list[GeoScaleLayer]) -> None:
    replaced = {layer.name: _replaced_forward(layer.site.attention) for layer in layers}
    names = [name for name, origin in replaced.items() if origin is not None]
    if names:
        logger.warning(
            "geoscale: %s replaced the forward of %s (%d of %d layers), and its code does not call transformers' attention "
            "interface: FP8 attention will not run there. Load the model without that library, or check the calls in "
            "geometry_report(model)",
            replaced[names[0]],
            names[0],
            len(names),
            len(layers),
        )


def _count_unsupported(model: PreTrainedModel, config: GeoScaleConfig, error: UnsupportedModelError) -> None:
    """Leave an unsupported model's attention as it is, and count its calls."""
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    innermost = [m for m in found if not any(inner is not m for inner in m.modules() if inner in found)]
    if not innermost:
        raise error
    implementation = model.config._attn_implementation
    for module in innermost:
        layer = PatchedLayer(config, type(module).__name__, str(error))
        layer.hooks.append(module.register_forward_pre_hook(layer.count_unsupported))
        _attach(module, layer, implementation)
    logger.warning("geoscale: attention stays %r, counted in geometry_report: %s", implementation, error)


def _attach(module: Any, layer: PatchedLayer, original: str) -> None:
    module.geoscale, module.geoscale_replaced = layer, original
    module.extra_repr = layer.describe


def _transformers_model(model: Any) -> PreTrainedModel:
    """The model itself, or the one inside a PEFT model."""
    base = model.get_base_model() if type(model).__module__.startswith("peft.") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"patch_model expects a PEFT model or a transformers PreTrainedModel, got {type(model).__name__}; "
            "patch the base model before wrapping it"
        )
    return base


def own_config(outer: nn.Module, model: PreTrainedModel) -> None:
    """Give the model a config object of its own: the name of the attention lives there, and other models may share it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in outer.modules():
        if getattr(module, "config", None) is shared:
            object.__setattr__(module, "config", own)


def patch_model(model: PreTrainedModel, config: GeoScaleConfig | None = None, **overrides) -> PreTrainedModel:
    """Run this model's attention in FP8, forward and backward, with scales read off its weights.

    In place, on this instance alone; patching again with the same configuration changes nothing, with another one replaces
    it. The model gets its own copy of its config. Parameters, buffers and checkpoints are untouched. Weights that FSDP2 shards,
    now or later, or that are still on the meta device, are measured in the first forward, where FSDP has gathered them.

    Args:
        model: a model of a family in docs/families.md, headless or with any head, or a PEFT model of one. Wrapping it
            with PEFT after patching works too.
        config: how to quantise; default `GeoScaleConfig()`.
        **overrides: fields of the config, e.g. `precision="high"`.
    Returns:
        The same model.
    Raises:
        TypeError: not a transformers model or a PEFT model of one, or an override that is no field of the config.
        UnsupportedModelError: an unknown family or weights whose geometry cannot be read (see `fallback`).
        NonFiniteWeightsError: NaN or Inf in the weights; the model stays unpatched.
    """
    outer, model = model, _transformers_model(model)
    config = replace(config or GeoScaleConfig(), **overrides)
    current = patched_layers(model)
    if current and all(layer.config == config for layer in current):
        return outer
    try:
        sites = list(attention_sites(model))
        alpha = None
        if config.bound == "rank_aware":
            alpha = model_alpha_min(model, sites[0], len(sites), config)
            if alpha is None:
                raise UnsupportedModelError(
                    f"bound='rank_aware' needs a low-rank interaction of queries and keys; {type(model).__name__} normalises "
                    "each head after its projection. Use bound='certified'"
                )
        refuse_parallelism(model)
        around = enclosing_modules(model)
        layers = [GeoScaleLayer(site, config, alpha, around[site.attention]) for site in sites]
        for layer in layers:
            refuse_prepared(layer.site.attention, layer.site.weight_modules(), layer.name)
        readable = [layer for layer in layers if layer.measurable]
        measurement = Measurement(readable) if readable else None
        if measurement is not None:
            measurement.check()
    except UnsupportedModelError as error:
        # with span scaling, attention that is left alone would go without it
        if config.fallback != "sdpa" or config.span_scaling is not None:
            raise
        unpatch_model(model)
        _count_unsupported(model, config, error)
        return outer
    unpatch_model(model)
    original = model.config._attn_implementation
    if original == NAME:  # the name alone, copied from a patched model's config, as TRL does for its reference model
        original = "sdpa"
    if measurement is not None:
        measurement.install()
    for layer in layers:
        if layer.geometry is None:
            layer.mark_stale()
    RefreshGroup().join(layers)
    own_config(outer, model)
    for layer in layers:
        _attach(layer.site.attention, layer, original)
        layer.site.attention._replicate_for_data_parallel = refuse_replicas
        if "deepspeed" in sys.modules and not layer.hooks:  # it may partition the model later
            layer.hooks.append(pass_by_position(layer.site.attention))
    if layers[0].site.stream is not None:
        layers[0].hooks.append(model.base_model.register_forward_pre_hook(refuse_embeddings, with_kwargs=True))
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        unpatch_model(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface; it cannot be patched"
        )
    _warn_of_replaced_forwards(layers)
    for layer in layers:
        front_end.install(layer)
    announce(layers)
    return outer


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `patch_model`: the model computes the very same bits as before. Does nothing to an unpatched model.

    The model keeps its own config object, so that changes made to it while patched are not lost.
    """
    original: str | None = None
    for module, layer in list(patched_modules(model)):
        original = module.geoscale_replaced
        layer.remove_hooks()
        front_end.remove(module)
        del module.geoscale, module.geoscale_replaced, module.extra_repr
        module.__dict__.pop("_replicate_for_data_parallel", None)
    if original is not None:
        _transformers_model(model).set_attn_implementation(original)
    return model


def refresh_scales(model: nn.Module, wait: bool = False) -> None:
    """Recompute every scale from the current weights, all layers or none.

    A forward that finds its layer's weights changed does this by itself, for all layers that changed; call it after writes
    that torch cannot see (through `param.data`), or to pay the cost outside the forward. Layers that FSDP2 shards are marked,
    and measured in their next forward: no collective runs here, but every process must call it.

    Args:
        wait: look for NaN and Inf before returning. Without it, weights on a GPU are looked at by the next refresh, so that
            the host need not wait for the device.
    Raises:
        ValueError: the model is not patched.
        UnsupportedModelError: weights whose geometry cannot be read any more (an adapter was added, say).
        NonFiniteWeightsError: NaN or Inf in the weights, or, on a GPU, in those of the last refresh; the old scales stay.
    """
    if not (patched := patched_layers(model)):
        raise ValueError("refresh_scales needs a patched model: call patch_model(model) first")
    layers = [layer for layer in patched if isinstance(layer, GeoScaleLayer)]
    if layers and layers[0].group.refresh_steadily(layers, wait):
        return
    measurable = [layer.measurable for layer in layers]
    readable = list(compress(layers, measurable))
    if readable:
        readable[0].group.refresh(readable, wait)
    for layer, here in zip(layers, measurable, strict=True):
        if not here:
            layer.mark_stale()


def scaling_state_dict(model: nn.Module) -> list[dict]:
    """State of scaling="delayed", layer by layer, for a checkpoint; empty dicts for other scalings, which need none."""
    return [
        layer.scaling.state_dict() if isinstance(layer.scaling, DelayedScaling) else {}
        for layer in geoscale_layers(model)
    ]


def load_scaling_state_dict(model: nn.Module, state: list[dict]) -> None:
    """Restore what `scaling_state_dict` returned. Raises ValueError unless layers, operands and history lengths are the same."""
    layers = geoscale_layers(model)
    if len(state) != len(layers):
        raise ValueError(f"the model has {len(layers)} FP8 layers, the state is of {len(state)}")
    for layer, given in zip(layers, state, strict=True):
        if isinstance(layer.scaling, DelayedScaling):
            layer.scaling.load_state_dict(given)
