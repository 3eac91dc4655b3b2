"""What a patched attention module carries: where its weights are, its scales, and what it has seen."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..config import GeoScaleConfig
from ..errors import NonFiniteWeightsError
from ..geometry import LayerGeometry, measure_layer
from ..kernels import AttentionStatistics
from ..scaling import GeometryScaling, QuantScales
from .families import AttentionSite


class PatchedLayer:
    """What every patched attention module carries as its attribute `geoscale`.

    By itself: a layer of an unsupported family under fallback="sdpa", whose calls are only counted.
    """

    def __init__(self, config: GeoScaleConfig, name: str):
        self.config = config
        self.name = name  # for messages
        self.calls = 0  # run in FP8
        self.delegated: Counter[str] = Counter()  # run by SDPA, by reason
        self.hook: RemovableHandle | None = None  # counts the calls of an unsupported family

    def describe(self) -> str:
        """One line of numerics for `print(model)`."""
        return "geoscale: unsupported family, attention unchanged"

    def count_unsupported(self, *_) -> None:
        """Forward pre-hook of an attention module of an unsupported family."""
        self.delegated["family"] += 1


class GeoScaleLayer(PatchedLayer):
    """State of one attention module that runs in FP8.

    Nothing of it enters a checkpoint: everything is recomputed from the weights. A layer refreshes itself when a forward
    finds its weights changed (loaded, stepped, moved), unless `scheduled`: then the callback answers for their drift.
    """

    def __init__(self, site: AttentionSite, config: GeoScaleConfig):
        super().__init__(config, f"{site.family} layer {site.layer}")
        self.site = site
        self.scaling = GeometryScaling(config.headroom)
        self.geometry: LayerGeometry | None = None
        self.weights_version: tuple | None = None
        self.scheduled = False
        self.sigma_drift = 0.0  # largest relative change of sigma_lower at the last refresh
        self.statistics = AttentionStatistics(config.observe_logits)
        self.peak_used: dict[str, Tensor] = {}  # operand → (H,), largest entry / certificate so far

    def measure(self) -> tuple[LayerGeometry, tuple]:
        """Geometry of today's weights and their version; changes nothing."""
        version = self.site.version()
        device = self.site.parameters()[0].device
        vectors = None if self.geometry is None else self.geometry.vectors
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            geometry = measure_layer(
                *self.site.projections(), self.site.softmax_scale, vectors=vectors, headroom=self.config.headroom
            )
        return geometry, version

    def install(self, geometry: LayerGeometry, version: tuple) -> None:
        """Use this geometry's scales from now on."""
        if self.geometry is not None:
            old = self.geometry.sigma_lower.to(geometry.sigma_lower.device)
            change = (geometry.sigma_lower / old.clamp_min(torch.finfo(old.dtype).tiny) - 1).abs()
            self.sigma_drift = float(change.amax())
        self.scaling.refresh(geometry)
        self.geometry, self.weights_version = geometry, version

    def scales(self, query: Tensor, key: Tensor, value: Tensor) -> QuantScales:
        """Scales of this call, of today's weights unless a callback schedules the refreshes."""
        if self.geometry is None or not (self.scheduled or self.weights_version == self.site.version()):
            geometry, version = self.measure()
            check_finite([(self, geometry)])
            self.install(geometry, version)
        return self.scaling.quant_scales(query, key, value)

    @property
    def max_weight_drift(self) -> float:
        """Largest movement of any weight that the scales in use still cover; see `weight_drift_budget`."""
        return 0.0 if self.geometry is None else self.geometry.max_weight_drift

    def drain_utilisation(self) -> float | None:
        """Worst certificate utilisation (largest entry / certificate) since the last call; None without a forward."""
        used = {name: share * self.config.headroom for name, share in self.statistics.range_used.items()}
        self.statistics.range_used = {}
        for name, share in used.items():
            self.peak_used[name] = torch.maximum(share, self.peak_used.get(name, share).to(share.device))
        return max((float(share.amax()) for share in used.values()), default=None)

    def describe(self) -> str:
        if self.geometry is None:
            return "geoscale: not measured yet"
        bounds = (self.geometry.q_bound, self.geometry.k_bound, self.geometry.v_bound, self.geometry.logit_bound)
        q, k, v, logit = (float(b.amax()) for b in bounds)
        mixing = "hadamard" if self.config.incoherent else "no hadamard"
        return (
            f"geoscale: E4M3, {self.config.bound}, {self.config.precision}, {mixing}, headroom {self.config.headroom:g}, "
            f"|q| ≤ {q:.3g}, |k| ≤ {k:.3g}, |v| ≤ {v:.3g}, |logit| ≤ {logit:.3g}"
        )


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
