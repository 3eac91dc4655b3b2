"""Refreshes of layers whose weights lie as they did in the last one: nobody asks again what their modules are.

What a refresh reads off modules (which classes, adapters, shapes, addresses) stays the same in training, so it is compared with
what it was, and the kernels read the same addresses. Anything else is read anew, as by the first refresh.
"""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_utils import is_fsdp_enabled

from ..geometry import LayerGeometry, LayerMaps, MatrixKernels, SteadyBatch
from .calls import call_state, hooks_before, own_numbers
from .families import AttentionSite
from .rotary import rotary_factor
from .sharding import shards_followed
from .versions import MARKS

if TYPE_CHECKING:
    from .layer import GeoScaleLayer


class SteadyLayers:
    """Layers that kernels measured where their parameters lie, and how these lay. Holds no module and no weight."""

    def __init__(self, layouts: Sequence[tuple], batches: Sequence[SteadyBatch]):
        self.layouts, self.batches = layouts, batches

    @classmethod
    def of(
        cls, layers: Sequence["GeoScaleLayer"], maps: Sequence[LayerMaps], kernels: MatrixKernels | None
    ) -> "SteadyLayers | None":
        """What can be kept of the reading of these layers that gave these maps; None where it has to be repeated."""
        config, interaction = layers[0].config, layers[0].scaling.needs_interaction
        if kernels is None or config.headroom != 1 or interaction or shards_followed():
            return None
        if not all(_lies_in_parameters(*pair) for pair in zip(layers, maps, strict=True)):
            return None
        layouts = []
        for layer in layers:
            if (found := layout(layer.site, layer.site.weight_modules(), rotary_factor(layer.site.rotary))) is None:
                return None
            layouts.append(found)
        batches = SteadyBatch.parts(maps, kernels)
        return None if batches is None else cls(layouts, batches)

    def versions(self, layers: Sequence["GeoScaleLayer"]) -> list[tuple] | None:
        """Of today's weights; None where these layers have to be read again."""
        if (
            len(layers) != len(self.layouts)
            or shards_followed()
            or is_fsdp_enabled()
            or not all(b.usable for b in self.batches)
        ):
            return None
        found: list[tuple] = []
        factors: dict[tuple[int, ...], float] = {}  # the layers of a model share their rotary embeddings
        for layer, before in zip(layers, self.layouts, strict=True):
            site = layer.site
            modules, rotary = site.weight_modules(), site.rotary
            shared = tuple(map(id, rotary))
            if (factor := factors.get(shared)) is None:
                factor = factors[shared] = rotary_factor(rotary)
            if layer.geometry is None or layout(site, modules, factor) != before:
                return None
            found.append(site.version(modules))
        return found

    def measure(self, layers: Sequence["GeoScaleLayer"]) -> list[LayerGeometry]:
        """Geometry of today's weights, right after `versions` gave theirs."""
        vectors = iter([layer.geometry.vectors for layer in layers if layer.geometry is not None])
        return [found for batch in self.batches for found in batch.measure([*islice(vectors, batch.layers)])]


def _lies_in_parameters(layer: "GeoScaleLayer", maps: LayerMaps) -> bool:
    """Whether weights and gains are parameters or views of them, not made of them for this reading."""
    stored = {p.untyped_storage().data_ptr() for p in layer.site.parameters()}
    read = [t for p in maps.projections for t in (p.weight, p.norm_gain) if t is not None]
    return all(t.untyped_storage().data_ptr() in stored for t in read)


def layout(site: AttentionSite, modules: Sequence[Any], factor: float) -> tuple | None:
    """All that decides a layer's maps but the values of its weights: two readings between which it stays the same differ in
    these alone. None where modules or parameters are more than they seem (adapters, wrappers, quantised weights, shards).

    The config's head counts are no part of it: they follow from the weights' shapes and the head dimension.

    Args:
        modules: `site.weight_modules()`.
        factor: `rotary_factor(site.rotary)`.
    """
    if site.stream is not None:
        return None
    attention: Any = site.attention
    found = [
        factor,
        site.softmax_scale,
        type(attention),
        attention.__dict__.get("head_dim"),
        *hooks_before(attention),
        *attention._modules,
    ]
    for module in modules:
        own = module.__dict__
        if module._modules or "weight" in own:
            return None
        found += (
            type(module),
            type(module).forward,
            call_state(module),
            own_numbers(module),
            own.get("offset"),
            own.get("zero_centered_gamma"),
        )
        for name, p in module._parameters.items():
            if p is None:
                found += name, None
            elif type(p) is nn.Parameter and MARKS.isdisjoint(p.__dict__):
                found += name, p.data_ptr(), p.dtype, p.shape, p.stride(), p.device
            else:
                return None
    return tuple(found)


def fresh_bytes(layer: "GeoScaleLayer", maps: LayerMaps) -> int:
    """Bytes of the weights that are no part of a parameter."""
    others = [p.weight for p in maps.projections if type(p.weight._base) is not nn.Parameter]  # no views of one
    if not others:
        return 0
    parameters = layer.site.parameters()
    stored = {p.untyped_storage().data_ptr() for p in parameters}
    storages = [weight.untyped_storage() for weight in others]
    return sum(s.nbytes() for s in storages if s.data_ptr() not in stored)
