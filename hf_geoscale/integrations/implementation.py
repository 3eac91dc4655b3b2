"""The name of the attention implementation in transformers' configs: set for patched attention alone, and put back."""

import copy
import logging
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UnsupportedAttentionError, UnsupportedModelError
from ..registration import NAME

logger = logging.getLogger(__name__)

_warned: WeakSet[Any] = WeakSet()
"""Groups of layers, one a model, of which a warning said that one runs another implementation."""

REPLACED = "geoscale_replaced"
"""Attribute of every module whose config was given the name: the implementation that it had before."""


def config_of(module: nn.Module) -> Any:
    """The transformers config that a module holds itself, or None. Wrappers that pass attributes on hold none."""
    config = module.__dict__.get("config")
    return config if hasattr(config, "_attn_implementation") else None


def implementation_of(module: nn.Module) -> str | None:
    """The attention implementation that a module's config names, or None without a config."""
    return getattr(module.__dict__.get("config"), "_attn_implementation", None)


def default_implementation(model: Any) -> str:
    """What transformers would choose for this model by itself: "sdpa", or "eager" where the model has no SDPA."""
    return model.get_correct_attn_implementation(None) if isinstance(model, PreTrainedModel) else "sdpa"


def own_configs(outer: nn.Module, configs: Iterable[Any]) -> None:
    """Give the modules inside `outer` copies of these config objects, which other models may share."""
    memo: dict[int, Any] = {}  # one for all, so that a config inside another one stays inside
    copies = {id(config): copy.deepcopy(config, memo) for config in configs}
    for module in outer.modules():
        own = copies.get(id(module.__dict__.get("config")))
        if own is not None:
            object.__setattr__(module, "config", own)


def _equal(config: Any, other: Any) -> bool:
    """Whether two config objects say the same."""
    if type(config) is not type(other) or config._attn_implementation != other._attn_implementation:
        return False
    return config.to_dict() == other.to_dict()


def _uses_the_interface(model: PreTrainedModel) -> bool:
    """Whether transformers finds its attention interface in the source of the model's class, or of the class it derives from.

    A subclass written in a notebook has no source to look into.
    """
    kinds: list[Any] = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]
    kind = kinds[0] if kinds else type(model)
    return bool(kind._can_set_attn_implementation())


def switch(outer: nn.Module, model: PreTrainedModel, attentions: Iterable[nn.Module]) -> None:
    """Have these attention modules of a model, and the models around them, run the `geoscale` attention; no other module.

    Each reads the name in a config object of this model's own: the model's where the attention's says the same, else a copy
    of the attention's. Copied, transplanted and unpickled layers hold configs of their own.

    Args:
        outer: the model, or what wraps it.
    Raises:
        UnsupportedModelError: the model does not use transformers' attention interface. Nothing has changed.
    """
    if not _uses_the_interface(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface; it cannot be patched"
        )
    attentions = list(attentions)
    inside = set(attentions)
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and not inside.isdisjoint(m.modules())]
    for attention in attentions:
        if attention.config is not model.config and _equal(attention.config, model.config):
            object.__setattr__(attention, "config", model.config)
    switched: list[Any] = [*around, *attentions]
    own_configs(outer, {id(m.config): m.config for m in switched}.values())
    for module in switched:
        before = module.config._attn_implementation
        # the name alone may be a copy of a patched model's, as TRL gives it to its reference model
        module.__dict__[REPLACED] = default_implementation(model) if before == NAME else before
    for module in switched:
        module.config._attn_implementation_internal = NAME  # the public setter reaches other towers' configs, too


def restore(module: nn.Module) -> None:
    """Put back the implementation of every module inside this one whose config says `geoscale`.

    Modules that `switch` never saw (wrappers built later, models that were given the name alone) get that of the model that it
    saw, or transformers' own choice.
    """
    found: list[Any] = [m for m in module.modules() if config_of(m) is not None]
    names = {id(m.config): m.__dict__[REPLACED] for m in found if REPLACED in m.__dict__}
    usual = next(iter(names.values()), None)
    # a config that `switch` did not copy may be another model's, too
    own_configs(module, [m.config for m in found if implementation_of(m) == NAME and id(m.config) not in names])
    for inner in found:
        inner.__dict__.pop(REPLACED, None)
        if implementation_of(inner) == NAME:
            name = names.get(id(inner.config)) or usual or default_implementation(inner)
            inner.config._attn_implementation_internal = name


def notice_another(attention: Any, mask: Any) -> None:
    """Before a call of a patched attention: say once, and count, that its config names another implementation, where it does.

    Raises:
        UnsupportedAttentionError: the model made the mask for `geoscale`, which no other implementation can read.
    """
    name = attention.config._attn_implementation
    if (
        name is None or not name.startswith(NAME)
    ) and "geoscale" in attention.__dict__:  # a fragility probe has a name of its own
        _notice(attention, name, mask)


@torch.compiler.disable
def _notice(attention: Any, name: str | None, mask: Any) -> None:
    layer = attention.__dict__["geoscale"]
    if isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.shape[-1:] == (2,):
        raise UnsupportedAttentionError(
            f"{layer.name} is patched, but its config says attn_implementation={name!r}, which cannot read the mask that the model "
            "made for FP8 attention. Call hf_geoscale.patch_model(model) again, or hf_geoscale.unpatch_model(model)"
        )
    layer.delegated[f"attn_implementation={name!r}"] += 1
    if layer.group not in _warned:
        _warned.add(layer.group)
        logger.warning(
            "geoscale: %s is patched, but its config says attn_implementation=%r: it does not run in FP8 (geometry_report has all "
            "such layers). Call patch_model(model) again, or unpatch_model(model)",
            layer.name,
            name,
        )


def watch(attention: nn.Module) -> RemovableHandle:
    """Have `notice_another` look at every call of an attention that has no forward of ours."""
    return attention.register_forward_pre_hook(_look, with_kwargs=True)


def _look(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    notice_another(attention, kwargs.get("attention_mask"))
