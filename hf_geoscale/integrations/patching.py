"""Swap the attention of a model in place, and swap it back."""

import inspect
import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..config import GeoScaleConfig, resolve_config
from ..errors import UnsupportedModelError
from ..registration import NAME
from . import front_end
from .announcement import announce
from .calls import release_watches
from .families import AttentionSite, attention_sites
from .implementation import restore, switch, watch
from .layer import GeoScaleLayer, PatchedLayer, model_alpha_min
from .patched import PATCHED, patched_layers, patched_modules, torch_module, transformers_model
from .places import anchor, follow_blocks, note_blocks
from .refresh import Measurement, RefreshGroup
from .residual import refuse_embeddings
from .sharding import enclosing_modules, refuse_parallelism, refuse_replicas
from .towers import refuse_by_tower
from .upward import anchored, release
from .zero3 import pass_by_position, refuse_prepared

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..config import GeoScaleOverrides

logger = logging.getLogger(__name__)


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
        layer = PatchedLayer(config, type(module).__name__, model.config.model_type, str(error))
        layer.hooks.append(module.register_forward_pre_hook(layer.count_unsupported))
        _attach(module, layer)
    logger.warning("geoscale: attention stays %r, counted in geometry_report: %s", implementation, str(error))


def _attach(module: Any, layer: PatchedLayer) -> None:
    module.geoscale = layer
    module.extra_repr = layer.describe


def _is_complete(model: PreTrainedModel, config: GeoScaleConfig) -> bool:
    """Whether the model is patched with this configuration, and no layer was added or switched since."""
    layers = patched_layers(model)
    if not layers or any(layer.config != config for layer in layers):
        return False
    if not isinstance(layers[0], GeoScaleLayer):
        return True
    if any(layer.elsewhere for layer in layers) or model.config._attn_implementation != NAME:
        return False
    try:
        sites = list(attention_sites(model))
    except UnsupportedModelError:
        return False
    return [site.attention for site in sites] == [module for module, _ in patched_modules(model)]


def _sites(outer: nn.Module, model: PreTrainedModel) -> list[AttentionSite]:
    try:
        return list(attention_sites(model))
    except UnsupportedModelError as error:
        refuse_by_tower(outer, model, error)
        raise


def _prepare(
    outer: nn.Module, model: PreTrainedModel, config: GeoScaleConfig
) -> tuple[list[GeoScaleLayer], Measurement | None]:
    """States for every attention layer of a model, and the geometry of its weights; the model is only read.

    Raises:
        UnsupportedModelError, NonFiniteWeightsError: see `patch_model`.
    """
    sites = _sites(outer, model)
    alpha = None
    if config.bound == "rank_aware":
        alpha = model_alpha_min(sites[0], len(sites), config)
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
    return layers, measurement


Model = TypeVar("Model", bound=nn.Module)


def patch_model(model: Model, config: GeoScaleConfig | None = None, **overrides: "Unpack[GeoScaleOverrides]") -> Model:
    """Run this model's attention in FP8, forward and backward, with scales read off its weights.

    In place, on this instance alone; patching again with the same configuration changes nothing, with another one replaces
    it. The model gets its own copy of its config. Parameters, buffers and checkpoints are untouched. Weights that FSDP2 shards,
    now or later, or that are still on the meta device, are measured in the first forward, where FSDP has gathered them.

    Args:
        model: a model of a family in docs/families.md, headless or with any head, or a PEFT model of one. Wrapping it
            with PEFT after patching works too. Of a multimodal model: its text tower.
        config: how to quantise; default `GeoScaleConfig()`.
        **overrides: fields of the config, e.g. `precision="high"`.
    Returns:
        The same model.
    Raises:
        TypeError: not a transformers model or a PEFT model of one, or an override that is no field of the config.
        UnsupportedModelError: an unknown family or weights whose geometry cannot be read (see `fallback`).
        NonFiniteWeightsError: NaN or Inf in the weights; the model stays unpatched.
    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(name), precision="high")
    """
    outer, inner = model, transformers_model(model, "patch_model")
    config = resolve_config(config, overrides, "patch_model")
    if _is_complete(inner, config):
        return outer
    try:
        layers, measurement = _prepare(outer, inner, config)
    except UnsupportedModelError as error:
        # with span scaling, attention that is left alone would go without it
        if config.fallback != "sdpa" or config.span_scaling is not None:
            raise
        unpatch_model(inner)
        _count_unsupported(inner, config, error)
        return outer
    if patched_layers(inner):
        unpatch_model(inner)
    switch(outer, inner, [layer.site.attention for layer in layers])
    if measurement is not None:
        measurement.install()
    for layer in layers:
        if layer.geometry is None:
            layer.mark_stale()
    _install(inner, layers)
    _warn_of_replaced_forwards(layers)
    announce(layers)
    return outer


def _install(model: PreTrainedModel, layers: list[GeoScaleLayer]) -> None:
    """Give every attention module its state and forward, and the modules around it what copies find them by."""
    PATCHED.add(model)
    RefreshGroup().join(layers)
    for layer in layers:
        attention = layer.site.attention
        anchor(layer)
        _attach(attention, layer)
        attention._replicate_for_data_parallel = refuse_replicas
        if "deepspeed" in sys.modules and not layer.hooks:  # it may partition the model later
            layer.hooks.append(pass_by_position(attention))
    front_end.install(layers)
    for layer in layers:
        if layer.front_end != front_end.FUSED:
            layer.hooks.append(watch(layer.site.attention))
    if layers[0].site.stream is not None:
        base = model.base_model
        note_blocks(base)
        anchored(base).hooks += [
            base.register_forward_pre_hook(follow_blocks),
            base.register_forward_pre_hook(refuse_embeddings, with_kwargs=True),
        ]


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`: the model computes the very same bits as before. Does nothing to an unpatched model.

    The model keeps its own config object, so that changes made to it while patched are not lost. A model that was left with
    the name "geoscale" and without patched layers gets transformers' own choice of attention back.

    Args:
        model: a patched model, or any module around one or several (DDP, a compiled or averaged model, a PEFT model).
    Raises:
        TypeError: no module, or a part of a patched model; nothing has changed.
    """
    outer = torch_module(model, "unpatch_model")
    found = list(patched_modules(outer))
    wholes = _wholes(outer, [layer for _, layer in found])
    for module, layer in found:
        layer.remove_hooks()
        front_end.remove(module)
        for name in ("geoscale", "extra_repr", "_replicate_for_data_parallel"):
            module.__dict__.pop(name, None)
    for whole in wholes:
        release_watches(whole.modules())
        for module in whole.modules():
            release(module)
        restore(whole)
    return model


def _wholes(outer: nn.Module, layers: Iterable[PatchedLayer]) -> list[nn.Module]:
    """`outer`, and the models that it is the patched part of. Raises TypeError for a part that leaves other layers patched."""
    inside = set(outer.modules())
    homes = {layer.site.model for layer in layers if isinstance(layer, GeoScaleLayer)} - inside - {None}
    for home in homes:
        if not inside.issuperset(module for module, _ in patched_modules(home)) and outer in set(home.modules()):
            raise TypeError(
                f"unpatch_model expects the whole model, got {type(outer).__name__}, a part of the patched {type(home).__name__}: "
                "call unpatch_model on that"
            )
    return [outer, *(home for home in homes if outer in set(home.modules()))]
