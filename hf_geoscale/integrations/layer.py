"""What a patched attention module carries: where its weights are, its scales, and what it has seen."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import GeoScaleConfig
from ..errors import UnsupportedModelError
from ..geometry import LayerGeometry, LayerMaps, alpha_min
from ..kernels.backend import NONE
from ..registration import NAME
from ..scaling import E4M3, CallOperands, QuantScales, strategy_of
from .announcement import Said, planned
from .families import AttentionSite
from .host_values import HostValues
from .observations import Observations
from .refresh import RefreshGroup
from .sharding import (
    can_be_read,
    enclosing_modules,
    follow_shards,
    fsdp_units,
    look_at_shards,
    refuse_unreadable,
)
from .upward import anchored
from .zero3 import gather_together, partitioned_parameters, pass_by_position

DEFAULT_LENGTH = 4096
"""Tokens assumed by the rank-aware bound where neither the config nor the model states a maximum (a guess)."""


def model_alpha_min(site: AttentionSite, layers: int, config: GeoScaleConfig) -> float | None:
    """α_min of a model from the shape of one of its layers; None where a per-head norm leaves no low-rank interaction."""
    query, _, _ = site.projections()
    heads, dim, width = query.weight.shape
    if width <= dim:
        return None
    stated = getattr(site.attention.config, "max_position_embeddings", None)
    length = config.max_length or stated or DEFAULT_LENGTH
    return alpha_min(width, dim, length, heads, layers, config.failure_prob)[0]


class PatchedLayer:
    """What every patched attention module carries as its attribute `geoscale`.

    By itself: a layer of an unsupported model under fallback="sdpa", whose calls are only counted.
    """

    def __init__(self, config: GeoScaleConfig, name: str, family: str, reason: str = ""):
        self.config = config
        self.name = name  # for messages
        self.family = family  # `model_type`
        self.reason = reason  # why it is only counted
        self.calls = 0  # run in FP8
        self.front_end_calls = 0  # of those, with RoPE inside the kernels
        self.front_end = "interface"  # "fused", or why not
        self.delegated: Counter[str] = Counter()  # run by SDPA, by reason
        self.hooks: list[RemovableHandle] = []  # of the attention module
        self.warned_of_others = False  # that attention modules beside it are not patched
        self.at_home = True  # False in a copy, until somebody has looked what is around it

    @property
    def elsewhere(self) -> str | None:
        """Why no call will run in FP8; None where calls do."""
        return self.reason or None

    @property
    def kernels(self) -> str:
        """What runs its FP8 calls."""
        return NONE

    def describe(self) -> str:
        """One line of numerics for `print(model)`."""
        return f"geoscale: attention unchanged ({self.reason})"

    def remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def count_unsupported(self, *_) -> None:
        """Forward pre-hook of an attention module of an unsupported model."""
        self.delegated["unsupported model"] += 1


class GeoScaleLayer(Observations, PatchedLayer):
    """State of one attention module that runs in FP8.

    Nothing of it enters a checkpoint: everything is recomputed from the weights. A layer refreshes itself when a forward
    finds its weights changed (loaded, stepped, moved), unless somebody who bounded the change has called `accept_drift`.
    Weights that FSDP2 or ZeRO-3 shards are only measured there, where they are gathered; see `sharding` and `zero3`.

    Args:
        enclosing: the attention module and all modules around it, where FSDP2 may shard it; not kept alive.
    """

    def __init__(
        self,
        site: AttentionSite,
        config: GeoScaleConfig,
        alpha: float | None = None,
        enclosing: tuple[nn.Module, ...] = (),
    ):
        PatchedLayer.__init__(self, config, f"{site.family} layer {site.layer}", site.family)
        Observations.__init__(self, config.observe_logits)
        self.site = site
        self._enclosing: list[ref[nn.Module]] | None = [ref(module) for module in enclosing]
        self.follows_shards = False
        self.scaling = strategy_of(config, alpha)
        self.geometry: LayerGeometry | None = None
        self.weights_version: tuple | None = None  # None: stale
        self.group = RefreshGroup()
        self.said = Said()
        self._measured: tuple[HostValues, int] | None = (
            None  # numbers of the last refresh, and this layer's place in them
        )

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: its first forward measures its own weights, and it counts its own calls.

        So no tensor is shared with the original, whose counters are written in place, and none needs a file descriptor on the
        way to another process.
        """
        of_these_weights = ("geometry", "weights_version", "_measured", "_enclosing")
        counted = {"calls": 0, "front_end_calls": 0, "delegated": Counter()}
        observed = vars(Observations(self.config.observe_logits))
        state = self.__dict__ | dict.fromkeys(of_these_weights) | counted | observed
        return state | {"follows_shards": False, "at_home": False}

    def move(self, site: AttentionSite) -> None:
        """Take this for the place of the attention: it was copied, or other layers were put in front of it."""
        self.site, self.name, self.family = site, f"{site.family} layer {site.layer}", site.family
        self._enclosing, self.weights_version = None, None

    @property
    def elsewhere(self) -> str | None:
        config = getattr(self.site.own.target(), "config", None)
        name = getattr(config, "_attn_implementation", NAME)
        return None if name == NAME else f"its config says attn_implementation={name!r}"

    @property
    def enclosing(self) -> Iterator[nn.Module]:
        """The attention module and all modules around it, outermost first; none where the model is not known."""
        if self._enclosing is None and (model := self.site.model) is not None:
            self._enclosing = [ref(module) for module in enclosing_modules(model).get(self.site.attention, ())]
        for around in self._enclosing or ():
            if (module := around()) is not None:
                yield module

    def read(self) -> tuple[LayerMaps, tuple]:
        """What today's weights compute, and their version; changes nothing.

        Raises:
            UnsupportedModelError: weights that cannot be read.
        """
        if self.site.stream is not None:
            self._refuse_sharded_stream()
        modules = self.site.weight_modules()
        refuse_unreadable(modules, self.name, self.enclosing)
        self.site.watch_calls()
        version = self.site.version(modules)
        vectors = None if self.geometry is None else self.geometry.vectors
        return LayerMaps(*self.site.projections(), self.site.softmax_scale, vectors), version

    def _refuse_sharded_stream(self) -> None:
        engine = "FSDP2" if fsdp_units(self.enclosing) else "DeepSpeed ZeRO-3"
        if engine == "FSDP2" or partitioned_parameters(self.site.weight_modules()):
            raise UnsupportedModelError(
                f"{self.name}: its v is bounded by the embedding and the norms of earlier layers, which {engine} has sharded again "
                "by then. Use DDP, or unpatch the model"
            )

    def use(self, geometry: LayerGeometry, version: tuple, values: HostValues, place: int) -> None:
        """Take this geometry; the scales follow."""
        self.enter(self.site.attention.training)
        self.forget(geometry)
        self.geometry, self.weights_version, self._measured = geometry, version, (values, place)

    @property
    def measurable(self) -> bool:
        """Whether the weights can be read outside a forward; those that FSDP2 or ZeRO-3 shards cannot."""
        return can_be_read(self.site.weight_modules())

    def mark_stale(self) -> None:
        """Measure again in the next forward.

        Raises:
            UnsupportedModelError: weights that nobody will gather around this attention.
        """
        self.follow_sharding()
        if not self.follows_shards:
            refuse_unreadable(self.site.weight_modules(), self.name)
        self.weights_version = None

    def follow_sharding(self) -> None:
        """If FSDP2 shards a module around this attention, look at the shards before each gathering from now on.

        If DeepSpeed ZeRO-3 partitions the weights, have it gather them for the whole attention.
        """
        if self.follows_shards:
            return
        if "deepspeed" in sys.modules and gather_together(self.site.attention, self.site.weight_modules()):
            self.follows_shards = True
            if not self.hooks:  # DeepSpeed was imported after patching
                self.hooks.append(pass_by_position(self.site.attention))
            return
        if not (units := fsdp_units(self.enclosing)):
            return
        self.follows_shards = True
        follow_shards(self.site.weight_modules())
        for unit in units:  # in front of FSDP's own hook, which gathers
            anchored(unit).hooks.append(unit.register_forward_pre_hook(self._before_gathering, prepend=True))

    @torch.compiler.disable
    def _before_gathering(self, *_) -> None:
        look_at_shards(self.site.weight_modules())

    def refresh_if_stale(self) -> None:
        """Measure and install again if the weights changed since they were measured or accepted."""
        self.follow_sharding()
        if self.geometry is None or self.weights_version != self.site.version():
            self.group.refresh_with_others(self)

    def accept_drift(self) -> None:
        """Take today's weights as covered by the scales in use: for whoever has bounded their drift by the headroom."""
        if self.weights_version is not None:
            look_at_shards(self.site.weight_modules())
            self.weights_version = self.site.version()
            self.enter(self.site.attention.training)

    def scales(self, call: CallOperands) -> QuantScales:
        """Scales of this call, of today's weights."""
        self.refresh_if_stale()
        return self.scaling.quant_scales(call)

    def observe(self, scales: QuantScales) -> None:
        """After a call with these scales: note what ran it, and tell the strategy what it saw, if it asks."""
        if (ran := self.statistics.kernels) is not None:
            self.kernel_calls[ran] += 1
            if ran not in self.said.names:
                self.said.say(self, ran)
        if not self.scaling.observes:
            return
        amax = {name: used * (E4M3.max / getattr(scales, name)) for name, used in self.statistics.latest.items()}
        self.scaling.observe(amax)

    def _number(self, row: int) -> float:
        """One of `Measurement`'s numbers for this layer, of the last refresh; 0 without headroom."""
        if self._measured is None or self.config.headroom == 1:
            return 0.0
        (total, *numbers), (_, place) = self._measured[0].read(), self._measured
        return numbers[row * (len(numbers) // 2) + place] if math.isfinite(total) else 0.0

    @property
    def max_weight_drift(self) -> float:
        """Largest movement of any weight that the scales in use still cover; see `weight_drift_budget`."""
        return self._number(0)

    @property
    def weight_amax(self) -> float:
        """Largest magnitude among the measured weights, where headroom leaves room for drift."""
        return self._number(1)

    @property
    def weight_epsilon(self) -> float:
        """Spacing at 1 of the coarsest of the weights' dtypes."""
        return max((torch.finfo(p.dtype).eps for p in self.site.parameters()), default=0.0)

    @property
    def kernels(self) -> str:
        """What ran its calls, most first; before one, what would run it. Names of `kernels.backend.kernels_on`."""
        ran = [name for name, _ in self.kernel_calls.most_common()]
        return ", ".join(ran) or planned(self).name

    def describe(self) -> str:
        if self.elsewhere is not None:
            return f"geoscale: not in FP8 ({self.elsewhere})"
        if self.geometry is None:
            return f"geoscale: not measured yet, {self.kernels}"
        bounds = (self.geometry.q_bound, self.geometry.k_bound, self.geometry.v_bound, self.geometry.logit_bound)
        q, k, v, logit = (float(b.amax()) for b in bounds)
        mixing = "hadamard" if self.config.incoherent else "no hadamard"
        source = self.config.bound if self.config.scaling == "geometry" else f"{self.config.scaling} scaling"
        if self.config.quantize_logits:
            source += ", FP8 logits"
        if (spans := self.config.span_scaling) is not None:
            source += f", gradient spans × {spans.a_parallel:g}, {spans.a_perpendicular:g}"
        return (
            f"geoscale: E4M3, {source}, {self.config.precision}, {mixing}, headroom {self.config.headroom:g}, {self.kernels}, "
            f"|q| ≤ {q:.3g}, |k| ≤ {k:.3g}, |v| ≤ {v:.3g}, |logit| ≤ {logit:.3g}"
        )
