"""Refreshing the scales of many layers at once. The host never waits for a GPU, except the first time."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import NonFiniteWeightsError, UnsupportedModelError
from ..geometry import LayerGeometry, LayerMaps, MatrixKernels, measure_layers
from ..kernels.backend import TRITON_INSTALLED
from ..kernels.shared_counters import start_over
from ..scaling import refresh_together
from .host_values import HostValues
from .sharding import refuse_parallelism
from .steady import SteadyLayers, fresh_bytes

if TYPE_CHECKING:
    from .layer import GeoScaleLayer

logger = logging.getLogger(__name__)

FRESH_BYTES = 2**28
"""Bytes of weights that exist only to be measured (dequantised, with adapters) held at a time."""


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """No gradients, no inference tensors, no autocast."""
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for device in filter(torch.is_autocast_enabled, _devices()):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@cache
def _devices() -> tuple[str, ...]:
    """Types of the devices of this process."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@cache
def _matrix_kernels() -> MatrixKernels | None:
    if not TRITON_INSTALLED:
        return None
    from ..kernels import spectral  # imports Triton

    return spectral


class Measurement:
    """Geometry of today's weights of some layers of one model; changes nothing before `install`.

    Args:
        found: the way to measure these layers without reading them, and their versions (`SteadyLayers.versions`).
    Raises:
        UnsupportedModelError: weights that cannot be read. NaN and Inf are left to `check`.
    """

    def __init__(self, layers: Sequence["GeoScaleLayer"], found: tuple[SteadyLayers, list[tuple]] | None = None):
        self._held = list(layers)  # until it is installed: a check that is put off keeps no layer alive
        self._references = [ref(layer) for layer in layers]
        self.versions: list[tuple] = []
        self.geometries: list[LayerGeometry] = []
        self.installed = False
        self.steady: SteadyLayers | None = None
        refuse_parallelism()
        with _exact_arithmetic():
            if found is None:
                self._read()
            else:
                self.steady, self.versions = found
                self.geometries = self.steady.measure(self.layers)
            self._values = HostValues(self._summary())

    @property
    def layers(self) -> list["GeoScaleLayer"]:
        """The layers that still live."""
        return [layer for reference in self._references if (layer := reference()) is not None]

    def _read(self) -> None:
        """Read all layers and measure them, as many together as their weights allow."""
        batch: list[LayerMaps] = []
        fresh = 0
        for layer in self.layers:
            maps, version = layer.read()
            self.versions.append(version)
            batch.append(maps)
            fresh += fresh_bytes(layer, maps)
            if fresh > FRESH_BYTES:
                self._measure(batch)
                batch, fresh = [], 0
        del maps
        self._measure(batch)
        if len(batch) == len(self.layers) and not fresh:
            self.steady = SteadyLayers.of(self.layers, batch, _matrix_kernels())

    def _measure(self, batch: list[LayerMaps]) -> None:
        """Measure these layers and forget their weights."""
        first = self.layers[0]
        headroom, interaction = first.config.headroom, first.scaling.needs_interaction
        self.geometries += measure_layers(batch, headroom, interaction, kernels=_matrix_kernels())

    def _summary(self) -> Tensor:
        """[sum of all bounds, budgets of weight drift, largest weights], the latter two by layer and with headroom only.

        No bound is below 0, so their sum is finite only if all are.
        """
        bounds = [b for g in self.geometries for b in (g.q_bound, g.k_bound, g.v_bound)]
        device = bounds[0].device
        total = _cat(bounds, device).sum(0, keepdim=True)
        if self.layers[0].config.headroom == 1:
            return total
        drifts = [g.weight_drift[None] for g in self.geometries if g.weight_drift is not None]
        return torch.cat([total, _cat(drifts, device), _cat([_weight_amax(layer) for layer in self.layers], device)])

    @property
    def known(self) -> bool:
        """Whether `check` needs no waiting, or may not be put off: nothing is there to go on with."""
        return self._values.here or any(layer.geometry is None for layer in self.layers)

    def install(self) -> None:
        """Use this geometry's scales from now on; maxima observed under the old weights are dropped."""
        with _exact_arithmetic():
            start_over([layer.statistics for layer in self.layers])
        self._before = [(layer.geometry, layer.weights_version) for layer in self.layers]
        for index, (layer, geometry, version) in enumerate(
            zip(self.layers, self.geometries, self.versions, strict=True)
        ):
            layer.use(geometry, version, self._values, index)
        with _exact_arithmetic():
            refresh_together([layer.scaling for layer in self.layers], self.geometries)
        self.installed = True
        self._held.clear()

    @property
    def arrived(self) -> bool:
        """Whether `check` needs no waiting now."""
        return self._values.arrived

    def check(self) -> None:
        """Raise NonFiniteWeightsError, naming the layer and operand, unless every certificate is finite; undoes `install`."""
        if math.isfinite(self._values.read()[0]):
            return
        if self.installed:
            self._undo()
        for reference, geometry in zip(self._references, self.geometries, strict=True):
            if (layer := reference()) is None:
                continue
            for name in ("q", "k", "v"):
                if not bool(torch.isfinite(getattr(geometry, f"{name}_bound")).all()):
                    raise NonFiniteWeightsError(
                        f"the weights that make {name} in layer {layer.site.layer} hold NaN or Inf, so they have no certificate; "
                        "the scales were left as they were. Reload a checkpoint, or look for the step that diverged"
                    )

    def _undo(self) -> None:
        for reference, (geometry, version) in zip(self._references, self._before, strict=True):
            if (layer := reference()) is not None and geometry is not None:
                layer.geometry, layer.weights_version = geometry, version
                layer.scaling.refresh(geometry)


def _cat(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    # into pinned host memory a copy would not be waited for
    on_gpu = device.type == "cuda"
    return torch.cat([part if part.device == device else part.to(device, non_blocking=on_gpu) for part in parts])


def _weight_amax(layer: "GeoScaleLayer") -> Tensor:
    """Largest magnitude of the parameters behind a layer's certificates: (1,) float64."""
    found = [torch.linalg.vector_norm(p.detach(), float("inf")) for p in layer.site.parameters() if p.numel()]
    if not found:
        return torch.zeros(1, dtype=torch.float64)
    return torch.stack([x.to(found[0].device, torch.float64) for x in found]).amax()[None]


class RefreshGroup:
    """The layers of one model, which are refreshed together, and the measurements whose check is still to come.

    A copy of it, as of a copied or unpickled model, has no layers; they join again when they are refreshed.
    """

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[GeoScaleLayer, None] = WeakKeyDictionary()
        self._pending: list[Measurement] = []
        self._steady: SteadyLayers | None = None  # left by the last measurement
        self._failed = False  # the last check that was made; then the next one is waited for

    def __reduce__(self) -> tuple:
        return RefreshGroup, ()

    @property
    def layers(self) -> list["GeoScaleLayer"]:
        return list(self._layers)

    @property
    def pending(self) -> bool:
        """Whether a check is still to come."""
        return bool(self._pending)

    def join(self, layers: Sequence["GeoScaleLayer"]) -> None:
        """Make these layers members, and nothing else their group."""
        for layer in layers:
            layer.group = self
            self._layers[layer] = None

    def refresh(self, layers: Sequence["GeoScaleLayer"], wait: bool = False) -> None:
        """Measure and install, all of these layers or none.

        Where an earlier measurement turns out to have seen NaN or Inf, today's weights decide: they may have been mended since.

        Args:
            wait: check for NaN and Inf now. Else, on a GPU, at the next optimizer step or refresh of any of these layers.
        """
        self._settle_or_warn(layers)
        self.install(Measurement(layers, self._look(layers)), wait)

    def refresh_steadily(self, layers: Sequence["GeoScaleLayer"], wait: bool = False) -> bool:
        """`refresh` of these layers, if nothing but their weights changed since they were refreshed together; whether it did."""
        if self._steady is None:
            return False
        self._settle_or_warn(layers)
        if (found := self._look(layers)) is None:
            return False
        self.install(Measurement(layers, found), wait)
        return True

    def _look(self, layers: Sequence["GeoScaleLayer"]) -> tuple[SteadyLayers, list[tuple]] | None:
        versions = None if self._steady is None else self._steady.versions(layers)
        return None if self._steady is None or versions is None else (self._steady, versions)

    def _settle_or_warn(self, layers: Sequence["GeoScaleLayer"]) -> None:
        try:
            self.settle(layers)
        except NonFiniteWeightsError as error:
            logger.warning("geoscale: found late, in an earlier refresh: %s. Today's weights are measured now", error)

    def install(self, measurement: Measurement, wait: bool = False) -> None:
        self.join(measurement.layers)
        self._steady = measurement.steady
        if wait or self._failed or measurement.known:
            self._failed = True
            measurement.check()
            self._failed = False
        else:
            self._pending.append(measurement)
            _unsettled.add(self)
        measurement.install()

    def settle(self, layers: Sequence["GeoScaleLayer"]) -> None:
        """Make the checks of these layers' earlier refreshes that were put off.

        Raises:
            NonFiniteWeightsError: one found NaN or Inf. Layers have the scales of before it.
        """
        due = [m for m in self._pending if any(layer in m.layers for layer in layers)]
        for measurement in due:
            if measurement in self._pending:
                self._pending.remove(measurement)
                try:
                    measurement.check()
                except NonFiniteWeightsError:
                    self._pending.clear()  # made later, of weights no better
                    self._failed = True
                    raise

    def settle_what_arrived(self) -> None:
        """Make the checks that need no waiting; as `settle`."""
        for measurement in [m for m in self._pending if m.arrived]:
            self.settle(measurement.layers)

    def refresh_with_others(self, layer: "GeoScaleLayer") -> None:
        """Refresh a layer in its forward, and every other one that the same optimizer step made stale."""
        others = [] if layer.follows_shards else [x for x in self._layers if x is not layer and _is_stale(x)]
        try:
            self.refresh([layer, *others])
        except UnsupportedModelError:
            if not others:
                raise
            self.refresh([layer])  # another one's weights, which its own forward will refuse


_unsettled: WeakSet[RefreshGroup] = WeakSet()


def _settle_before_optimizer_step(*_) -> None:
    """Raise NonFiniteWeightsError before an optimizer step spreads NaN from one weight to all, where that is known by now."""
    for group in list(_unsettled):
        group.settle_what_arrived()
        if not group.pending:
            _unsettled.discard(group)


register_optimizer_step_pre_hook(_settle_before_optimizer_step)


def _is_stale(layer: "GeoScaleLayer") -> bool:
    """Whether a layer was measured before and its weights, readable here, changed. In evaluation mode that takes a checksum."""
    if layer.geometry is None or layer.follows_shards or not layer.site.attention.training or not layer.measurable:
        return False
    return layer.weights_version != layer.site.version()
