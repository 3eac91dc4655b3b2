"""Where patched layers are in their model: found again after layers were copied, unpickled, put in, taken out or moved."""

from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .families import attention_sites
from .layer import GeoScaleLayer
from .patched import geoscale_layers, patched_modules
from .refresh import RefreshGroup
from .upward import anchored


def anchor(layer: GeoScaleLayer) -> None:
    """Let copies of the modules around a layer be found by the copies of its references to them."""
    site = layer.site
    anchored(site.attention, site.own)
    anchored(site.block, site.upward)
    anchored(site.model, site.home)
    if site.stream is not None:
        for block, _ in site.stream.norms:
            anchored(block.target(), block)


def settle_in(model: nn.Module) -> None:
    """Tell every patched layer of a model where it is now; their next forward measures all of them.

    Raises:
        UnsupportedModelError: see `attention_sites`.
    """
    states = {module: layer for module, layer in patched_modules(model) if isinstance(layer, GeoScaleLayer)}
    layers = []
    for site in attention_sites(model):
        if (layer := states.get(site.attention)) is not None:
            layer.move(site)
            anchor(layer)
            layers.append(layer)
    groups = [layer.group for layer in layers if layer.at_home]
    (groups[0] if groups else RefreshGroup()).join(layers)
    for layer in layers:
        layer.at_home = True


def settle_strangers(model: nn.Module) -> None:
    """`settle_in`, if any patched layer of this model was copied without a model, or believes to be in another one."""
    homeless = any(layer.site.model is None for layer in geoscale_layers(model))
    if homeless or not all(_holds(home, model) for home in _homes(model)):
        settle_in(model)


def _homes(model: nn.Module) -> list[nn.Module]:
    """The models that the patched layers in this one believe to be in, each once."""
    return [*dict.fromkeys(layer.site.model for layer in geoscale_layers(model) if layer.site.model is not None)]


def _holds(home: nn.Module, model: nn.Module) -> bool:
    return any(module is model for module in home.modules())


_blocks: WeakKeyDictionary[nn.Module, list[ref[nn.Module]]] = WeakKeyDictionary()
"""Of a post-norm decoder: its blocks when its layers were last told where they are."""


def note_blocks(base: nn.Module) -> None:
    """Take the blocks of a decoder as those that its layers know."""
    _blocks[base] = [ref(block) for block in _blocks_of(base)]


def _blocks_of(base: nn.Module) -> list[nn.Module]:
    return [block for child in base.children() if isinstance(child, nn.ModuleList) for block in child.children()]


@torch.compiler.disable
def follow_blocks(base: nn.Module, *_) -> None:
    """Forward pre-hook of a post-norm decoder: the norms of all blocks before a layer bound its tokens.

    A block that was put in, taken out or moved since the layers were measured changes that bound.
    """
    known, blocks = _blocks.get(base), _blocks_of(base)
    if known is not None and [reference() for reference in known] == blocks:
        return
    settle_in(next((home for home in _homes(base) if _holds(home, base)), base))
    note_blocks(base)
