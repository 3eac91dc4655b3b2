"""What transformers calls under the name `geoscale`: attention, mask, and the patching of models that have the name alone.

`from_pretrained(..., attn_implementation="geoscale")` builds a model that nobody has patched. Its first forward asks for a mask
before any layer runs. Right there the running model is patched whole, so that this forward computes what it would have computed
after `patch_model`. A forward that brings its own 4D mask asks for none: there the first attention call patches, and that one
layer keeps to the attention interface, since its operands are made already.
"""

import logging
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..config import GeoScaleConfig
from ..errors import UnsupportedModelError
from ..registration import NAME
from . import front_end
from .attention import geoscale_attention_forward
from .implementation import watch
from .layer import GeoScaleLayer, PatchedLayer
from .masks import geoscale_mask
from .patched import PATCHED, patched_layers, patched_modules
from .patching import patch_model
from .places import settle_in
from .running import running_models, runs_compiled
from .sharding import fsdp_units, is_partitioned, is_shard, refuse_replicas
from .transforms import may_be_transformed, outside_graphs, refuse_transforms

logger = logging.getLogger(__name__)

_patching = RLock()  # first forwards of one model in several threads
_patched_configs: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Configs of models known to be patched, by id, so that later forwards look at no frames."""


def attention_by_name(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs):
    """`geoscale_attention_forward`, after patching the model of a module that nobody patched."""
    if may_be_transformed():
        refuse_transforms(query, key, value)
    try:
        at_home = module.__dict__["geoscale"].at_home
    except KeyError:
        at_home = False
    if not at_home:
        _find_home(module, module.__dict__.get("geoscale"))
    return geoscale_attention_forward(module, query, key, value, attention_mask, **kwargs)


def mask_by_name(*args, config: Any = None, **kwargs):
    """`geoscale_mask`, after patching the model of a config that nobody patched."""
    if may_be_transformed():
        refuse_transforms()
    if config is not None and _patched_configs.get(id(config)) is not config:
        with _patching:
            _patch_before_first_layer()
    return geoscale_mask(*args, config=config, **kwargs)


def _candidates(inner: nn.Module | None) -> list[PreTrainedModel]:
    """Running models that name this attention and have `inner` inside them (None: the innermost running model), outermost first."""
    running = running_models()
    inner = inner if inner is not None else next(iter(running), None)
    named = [model for model in running if model.config._attn_implementation == NAME]
    return [model for model in reversed(named) if any(module is inner for module in model.modules())]


def _patch_before_first_layer() -> None:
    models = _candidates(None)
    if not models:
        return  # a mask that somebody makes outside a forward
    if not _is_patched(models[0]):
        _patch(models[0])
    for model in models:
        _patched_configs[id(model.config)] = model.config


def _is_patched(model: nn.Module) -> bool:
    return next(patched_modules(model), None) is not None


def _find_home(module: nn.Module, layer: PatchedLayer | None) -> None:
    """Patch the running model with this attention in it; a layer that was copied into a patched model takes its place there.

    Raises:
        UnsupportedModelError: nothing patches this attention.
    """
    with _patching:
        models = _candidates(module)
        if isinstance(layer, GeoScaleLayer):
            if not layer.site.is_whole and models:
                settle_in(models[0])
            layer.at_home = layer.site.is_whole
            return
        if "geoscale" in module.__dict__:
            return  # another thread was faster
        if not models:
            raise UnsupportedModelError(
                f"{type(module).__name__} runs with attn_implementation={NAME!r} but was never patched, and no transformers model "
                "that could be patched runs around it: call hf_geoscale.patch_model(model)"
            )
        if not _is_patched(models[0]):
            _patch(models[0])
        late = module.__dict__.get("geoscale")
        if not isinstance(late, GeoScaleLayer):
            raise UnsupportedModelError(
                f"{type(module).__name__} runs with attn_implementation={NAME!r}, but it was never patched: it was added to the "
                f"patched {type(models[0]).__name__} later, or is of another tower. Call hf_geoscale.patch_model(model) again, "
                "or set another implementation on its config"
            )
        if late.front_end == "fused":
            front_end.remove(module)
            late.hooks.append(watch(module))
            late.front_end = "its first call, with a mask of the caller's own, came before the model was patched"


def _patch(model: PreTrainedModel) -> None:
    """Patch a model that was given the name alone, with the default configuration."""
    if getattr(model, "_is_replica", False):
        refuse_replicas()
    _refuse_prepared(model)
    used = [layer.config for other in list(PATCHED) if other is not model for layer in patched_layers(other)]
    differs = any(config != GeoScaleConfig() for config in used)
    logger.log(
        logging.WARNING if differs else logging.INFO,
        "geoscale: %s has attn_implementation=%r and is patched in its first forward, with the default configuration%s. For "
        "another one call hf_geoscale.patch_model(model, ...)",
        type(model).__name__,
        NAME,
        "; another model here has another one (GeoScaleCallback().attach(trainer) gives a reference model its policy's)"
        if differs
        else "",
    )
    patch_model(model, GeoScaleConfig())


def _refuse_prepared(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where patching in the first forward comes too late."""
    parameters = list(model.parameters())
    if any(map(is_partitioned, parameters)):
        what, before = "DeepSpeed ZeRO-3 has partitioned", "accelerator.prepare (deepspeed.initialize)"
    elif any(map(is_shard, parameters)) or fsdp_units(model.modules()):
        what, before = "FSDP2 has sharded", "fully_shard (accelerator.prepare)"
    elif runs_compiled():
        what, before = "torch.compile has compiled", "its first compiled forward"
    else:
        return
    raise UnsupportedModelError(
        f"{type(model).__name__} was given attn_implementation={NAME!r} alone, and {what} it before its first forward, which would "
        f"have patched it. Add the line hf_geoscale.patch_model(model) before {before}"
    )


# At import, so that an unpickled patched model finds them in a new process. torch.compile leaves both out of its graphs: they read
# the weights' versions and count calls, which a graph would freeze, and a CUDA graph would replay with old scales.
AttentionInterface.register(NAME, outside_graphs(attention_by_name))
AttentionMaskInterface.register(NAME, outside_graphs(mask_by_name))
