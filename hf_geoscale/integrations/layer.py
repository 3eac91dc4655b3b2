"""What a patched attention module carries: where its weights are, its scales, and what it has seen."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import GeoScaleConfig
from ..errors import NonFiniteWeightsError, UnsupportedModelError
from ..geometry import LayerGeometry, alpha_min, measure_layer
from ..kernels import AttentionStatistics
from ..scaling import E4M3, CallOperands, QuantScales, strategy_of
from .families import AttentionSite
from .sharding import (
    can_be_read,
    follow_shards,
    fsdp_units,
    look_at_shards,
    refuse_parallelism,
    refuse_unreadable,
)

DEFAULT_LENGTH = 4096
"""Tokens assumed by the rank-aware bound where neither the config nor the model states a maximum (a guess)."""


def model_alpha_min(model: Any, site: AttentionSite, layers: int, config: GeoScaleConfig) -> float | None:
    """α_min of a model from the shape of one of its layers; None where a per-head norm leaves no low-rank interaction."""
    query, _, _ = site.projections()
    heads, dim, width = query.weight.shape
    if width <= dim:
        return None
    length = config.max_length or getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    return alpha_min(width, dim, length, heads, layers, config.failure_prob)[0]


class PatchedLayer:
    """What every patched attention module carries as its attribute `geoscale`.

    By itself: a layer of an unsupported model under fallback="sdpa", whose calls are only counted.
    """

    def __init__(self, config: GeoScaleConfig, name: str, reason: str = ""):
        self.config = config
        self.name = name  # for messages
        self.reason = reason  # why it is only counted
        self.calls = 0  # run in FP8
        self.fused_calls = 0  # of those, with RoPE inside the kernels
        self.front_end = "interface"  # "fused", or why not
        self.delegated: Counter[str] = Counter()  # run by SDPA, by reason
        self.hooks: list[RemovableHandle] = []

    def describe(self) -> str:
        """One line of numerics for `print(model)`."""
        return f"geoscale: attention unchanged ({self.reason})"

    def remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def count_unsupported(self, *_) -> None:
        """Forward pre-hook of an attention module of an unsupported model."""
        self.delegated["unsupported model"] += 1


class GeoScaleLayer(PatchedLayer):
    """State of one attention module that runs in FP8.

    Nothing of it enters a checkpoint: everything is recomputed from the weights. A layer refreshes itself when a forward
    finds its weights changed (loaded, stepped, moved), unless somebody who bounded the change has called `accept_drift`.
    Weights that FSDP2 shards are only measured there, where FSDP has gathered them; see `sharding`.

    Args:
        enclosing: the attention module and all modules around it, where FSDP2 may shard it.
    """

    def __init__(
        self,
        site: AttentionSite,
        config: GeoScaleConfig,
        alpha: float | None = None,
        enclosing: tuple[nn.Module, ...] = (),
    ):
        super().__init__(config, f"{site.family} layer {site.layer}")
        self.site = site
        self.enclosing = enclosing
        self.follows_shards = False
        self.scaling = strategy_of(config, alpha)
        self.geometry: LayerGeometry | None = None
        self.weights_version: tuple | None = None  # None: stale
        self.weight_amax = self.weight_epsilon = 0.0  # of the measured weights, where headroom leaves room for drift
        self.sigma_drift = torch.zeros(())  # largest relative change of sigma_lower at the last refresh
        self.statistics = AttentionStatistics(config.observe_logits)
        self.observed: dict[str, Tensor] = {}  # operand → (H,), largest magnitude in real units since the last refresh
        self.interval_utilisation: Tensor | None = None  # () since the last `drain_utilisation`
        self.peak_utilisation: Tensor | None = None  # () since patching
        self.peak_logit_utilisation: Tensor | None = None  # () of quantised logits, since patching

    def measure(self) -> tuple[LayerGeometry, tuple]:
        """Geometry of today's weights and their version; changes nothing.

        Raises:
            UnsupportedModelError: weights that cannot be read; NonFiniteWeightsError is left to `check_finite`.
        """
        refuse_parallelism()
        if self.site.stream is not None and fsdp_units(self.enclosing):
            raise UnsupportedModelError(
                f"{self.name}: its v is bounded by the embedding and the norms of earlier layers, which FSDP2 has sharded again by "
                "then. Use DDP, or unpatch the model"
            )
        refuse_unreadable(self.site.weight_modules(), self.name, self.enclosing)
        version = self.site.version()
        device = next(p for module in self.site.weight_modules() for p in module.parameters()).device
        vectors = None if self.geometry is None else self.geometry.vectors
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            geometry = measure_layer(
                *self.site.projections(),
                self.site.softmax_scale,
                vectors=vectors,
                headroom=self.config.headroom,
                interaction=self.scaling.needs_interaction,
            )
        return geometry, version

    def install(self, geometry: LayerGeometry, version: tuple) -> None:
        """Use this geometry's scales from now on; maxima observed under the old weights are dropped."""
        self.collect()
        self.observed, self.statistics.logit_amax = {}, None
        if self.geometry is not None:
            old = self.geometry.sigma_lower.to(geometry.sigma_lower.device)
            self.sigma_drift = (geometry.sigma_lower / old.clamp_min(torch.finfo(old.dtype).tiny) - 1).abs().amax()
        self.scaling.refresh(geometry)
        self.geometry, self.weights_version = geometry, version
        if self.config.headroom > 1:
            weights = [p.detach() for p in self.site.parameters()]
            self.weight_amax = max((float(w.abs().amax()) for w in weights), default=0.0)
            self.weight_epsilon = max((torch.finfo(w.dtype).eps for w in weights), default=0.0)

    @property
    def measurable(self) -> bool:
        """Whether the weights can be read outside a forward; those that FSDP2 shards cannot."""
        return can_be_read(self.site.weight_modules())

    def mark_stale(self) -> None:
        """Measure again in the next forward.

        Raises:
            UnsupportedModelError: weights that no FSDP2 module around this attention will gather.
        """
        self.follow_sharding()
        if not self.follows_shards:
            refuse_unreadable(self.site.weight_modules(), self.name)
        self.weights_version = None

    def follow_sharding(self) -> None:
        """If FSDP2 shards a module around this attention, look at the shards before each gathering from now on."""
        if self.follows_shards or not (units := fsdp_units(self.enclosing)):
            return
        self.follows_shards = True
        follow_shards(self.site.weight_modules())
        # In front of FSDP's own hook, which gathers.
        self.hooks += [unit.register_forward_pre_hook(self._before_gathering, prepend=True) for unit in units]

    @torch.compiler.disable
    def _before_gathering(self, *_) -> None:
        look_at_shards(self.site.weight_modules())

    def refresh_if_stale(self) -> None:
        """Measure and install again if the weights changed since they were measured or accepted."""
        self.follow_sharding()
        if self.geometry is None or self.weights_version != self.site.version():
            geometry, version = self.measure()
            check_finite([(self, geometry)])
            self.install(geometry, version)

    def accept_drift(self) -> None:
        """Take today's weights as covered by the scales in use: for whoever has bounded their drift by the headroom."""
        if self.weights_version is not None:
            look_at_shards(self.site.weight_modules())
            self.weights_version = self.site.version()

    def scales(self, call: CallOperands) -> QuantScales:
        """Scales of this call, of today's weights."""
        self.refresh_if_stale()
        return self.scaling.quant_scales(call)

    def observe(self, scales: QuantScales) -> None:
        """After a call with these scales: tell the strategy what it saw, if it asks."""
        if not self.scaling.observes:
            return
        amax = {name: used * (E4M3.max / getattr(scales, name)) for name, used in self.statistics.latest.items()}
        self.scaling.observe(amax)

    @property
    def max_weight_drift(self) -> float:
        """Largest movement of any weight that the scales in use still cover; see `weight_drift_budget`."""
        return 0.0 if self.geometry is None else self.geometry.max_weight_drift

    def collect(self) -> None:
        """Move what the calls saw out of the op's statistics; waits for no device."""
        for name, share in self.statistics.range_used.items():
            used = share * (self.config.headroom if self.config.scaling == "geometry" else 1.0)
            if name == "logit":
                self.peak_logit_utilisation = _largest(used.amax(), self.peak_logit_utilisation)
                continue
            if self.config.scaling == "geometry" and self.geometry is not None:
                bound = getattr(self.geometry, f"{name}_bound").to(used.device, torch.float32)
                self.observed[name] = _largest(used * bound, self.observed.get(name))
            self.interval_utilisation = _largest(used.amax(), self.interval_utilisation)
            self.peak_utilisation = _largest(used.amax(), self.peak_utilisation)
        self.statistics.range_used = {}

    def drain_utilisation(self) -> float | None:
        """Worst utilisation (largest entry / certificate, or / largest number) since the last call; None without a forward."""
        self.collect()
        used, self.interval_utilisation = self.interval_utilisation, None
        return None if used is None else float(used)

    def describe(self) -> str:
        if self.geometry is None:
            return "geoscale: not measured yet"
        bounds = (self.geometry.q_bound, self.geometry.k_bound, self.geometry.v_bound, self.geometry.logit_bound)
        q, k, v, logit = (float(b.amax()) for b in bounds)
        mixing = "hadamard" if self.config.incoherent else "no hadamard"
        source = self.config.bound if self.config.scaling == "geometry" else f"{self.config.scaling} scaling"
        if self.config.quantize_logits:
            source += ", FP8 logits"
        return (
            f"geoscale: E4M3, {source}, {self.config.precision}, {mixing}, headroom {self.config.headroom:g}, "
            f"|q| ≤ {q:.3g}, |k| ≤ {k:.3g}, |v| ≤ {v:.3g}, |logit| ≤ {logit:.3g}"
        )


def _largest(new: Tensor, old: Tensor | None) -> Tensor:
    return new if old is None else torch.maximum(new, old.to(new.device))


def check_finite(measured: list[tuple[GeoScaleLayer, LayerGeometry]]) -> None:
    """Raise NonFiniteWeightsError, naming the layer and operand, unless every certificate is finite."""
    bounds = [torch.cat([g.q_bound, g.k_bound, g.v_bound]) for _, g in measured]
    if not bounds or bool(torch.isfinite(torch.cat([b.to(bounds[0].device) for b in bounds])).all()):
        return
    for layer, geometry in measured:
        for name in ("q", "k", "v"):
            if not bool(torch.isfinite(getattr(geometry, f"{name}_bound")).all()):
                raise NonFiniteWeightsError(
                    f"the weights that make {name} in layer {layer.site.layer} hold NaN or Inf, so they have no certificate; "
                    "the scales were left as they were. Reload a checkpoint, or look for the step that diverged"
                )
