"""The scales of a patched model from outside: refresh them, save and restore their history."""

from itertools import compress

from torch import nn

from ..scaling import DelayedScaling
from .layer import GeoScaleLayer
from .patched import (
    geoscale_layers,
    left_out,
    outermost_models,
    patched_layers,
    torch_module,
    warn_of_left_out,
)
from .places import settle_strangers


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
    model = torch_module(model, "refresh_scales")
    if not (patched := patched_layers(model)):
        raise ValueError("refresh_scales needs a patched model: call patch_model(model) first")
    layers = [layer for layer in patched if isinstance(layer, GeoScaleLayer)]
    if layers and layers[0].group.refresh_steadily(layers, wait):
        return
    for inner in outermost_models(model):
        settle_strangers(inner)
    warn_of_left_out(patched, left_out(model))
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
