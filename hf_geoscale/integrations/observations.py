"""What the calls of a patched layer saw, in training and in evaluation mode apart, and how far its certificates moved."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import GeoScaleConfig
from ..geometry import LayerGeometry
from ..kernels import AttentionStatistics
from ..kernels.statistics import Interval
from .utilisation import Utilisation, add_together


class Observations:
    """Counters of one layer; nothing here waits for a device but the numbers that are read.

    A layer's mode is that of its attention module when its weights were last measured or accepted: every change of mode is a new
    version of the weights (`AttentionSite.version`), so each forward belongs to the mode it ran in.
    """

    config: GeoScaleConfig
    geometry: LayerGeometry | None

    def __init__(self, observe_logits: bool):
        self.statistics = AttentionStatistics(observe_logits)
        self.utilisation = {True: Utilisation(), False: Utilisation()}  # in training mode, in evaluation mode
        self.observed: dict[str, Tensor] = {}  # operand → (H,), largest magnitude in real units since the last refresh
        self.kernel_calls: Counter[str] = Counter()  # calls by what ran them
        self.training, self.changed_mode = True, False  # the latter: since the last refresh
        self._evaluated: Tensor | None = None  # () overflows of calls in evaluation mode, before today's mode began
        self._mark: Tensor | None = None  # () overflows of all calls when it began
        self._before: tuple[dict[str, Tensor], Interval | None, LayerGeometry | None] = {}, None, None
        self._taken: Interval | None = None  # the last of `statistics.before` that `_before` was told of
        self.bounds_before: tuple[Tensor, ...] | None = None  # of q, k and v at the refresh before the last

    def enter(self, training: bool) -> None:
        """What calls saw from here on is of this mode."""
        if training is self.training:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.collect()
            total = self.statistics.total
            if not self.training:
                self._evaluated = self._since_mark(total)
        self._mark, self.training = total, training
        self.changed_mode = True

    def _since_mark(self, total: Tensor | None) -> Tensor | None:
        """() overflows in evaluation mode, where today's mode is that and `total` the overflows so far."""
        parts = [(self._evaluated, 1), (total, 1), (self._mark, -1)]
        known = [(x, sign) for x, sign in parts if x is not None]
        return (
            sum((x.to(known[0][0].device) * sign for x, sign in known), torch.zeros_like(known[0][0]))
            if known
            else None
        )

    @property
    def evaluation_overflows(self) -> int:
        """Overflows of the calls in evaluation mode; waits for the device."""
        count = self._evaluated if self.training else self._since_mark(self.statistics.total)
        return 0 if count is None else max(0, int(count))

    def forget(self, geometry: LayerGeometry) -> None:
        """The weights were measured anew: `observed` starts over, and the certificates so far are those of before."""
        before = self.statistics.before
        if self.observed or before is not self._taken:
            self._before = self.observed, None if before is self._taken else before, self.geometry
            self.observed, self._taken = {}, before
        old, changed, self.changed_mode = self.geometry, self.changed_mode, False
        comparable = old is not None and not changed and old.q_bound.device == geometry.q_bound.device
        self.bounds_before = _bounds(old) if old is not None and comparable else None

    def seen(self) -> dict[str, Tensor]:
        """Largest magnitude by operand and head, (H,) in real units, of the calls since the last refresh.

        Before the first of these: of the calls between the last two refreshes that had calls between them.
        """
        self.collect()
        if self.observed:
            return self.observed
        observed, before, geometry = self._before
        if before is not None and geometry is not None and self.config.scaling == "geometry":
            observed = dict(observed)
            self._widen(observed, before.ranges(), geometry)
        return observed

    def logits_seen(self) -> Tensor | None:
        """Largest |logit| by head, (Hq,), of the same calls; None without `observe_logits`."""
        before, amax = self._before[1], self.statistics.logit_amax
        return amax if amax is not None or self.observed or before is None else before.logit_amax

    def _widen(self, observed: dict[str, Tensor], ranges: dict[str, Tensor], geometry: LayerGeometry) -> None:
        for name, used in ranges.items():
            if name != "logit":
                bound = getattr(geometry, f"{name}_bound").float().to(used.device)
                observed[name] = _largest(used * self._range * bound, observed.get(name))

    def collect(self) -> None:
        """Move what the calls saw out of the op's statistics; waits for no device."""
        if self.config.scaling == "geometry" and self.geometry is not None:
            self._widen(self.observed, self.statistics.range_used, self.geometry)
        self._collect_earlier()
        add_together([(self.utilisation[self.training].interval, self.statistics.range_used)])
        self.statistics.range_used = {}

    def _collect_earlier(self) -> None:
        """What calls before the last refresh saw: of other weights, so of no use to `observed`."""
        add_together([(self.utilisation[self.training].interval, self.statistics.take_earlier())])

    def _peak(self, *names: str) -> float | None:
        self._collect_earlier()
        used = [x for x in (part.peak(*names) for part in self.utilisation.values()) if x is not None]
        return None if not used else max(map(float, used)) * self._range

    @property
    def _range(self) -> float:
        """The certificate in units of the range."""
        return self.config.headroom if self.config.scaling == "geometry" else 1.0

    def drain_utilisation(self, training: bool = True) -> float | None:
        """Worst utilisation (largest entry / certificate, or / largest number) since the last call; None without a forward.

        Args:
            training: of the forwards in training mode, or of those in evaluation mode.
        """
        self.collect()
        used = self.utilisation[training].drain()
        return None if used is None else float(used) * self._range

    @property
    def peak_utilisation(self) -> float | None:
        """Worst utilisation of q, k and v since patching; None without a forward."""
        return self._peak("q", "k", "v")

    @property
    def peak_logit_utilisation(self) -> float | None:
        """The same of quantised logits."""
        return self._peak("logit")


def _bounds(geometry: LayerGeometry) -> tuple[Tensor, ...]:
    return geometry.q_bound, geometry.k_bound, geometry.v_bound


def _largest(new: Tensor, old: Tensor | None) -> Tensor:
    return new if old is None else torch.maximum(new, old.to(new.device))


def certificate_drift(layers: Sequence[Observations]) -> tuple[float, int]:
    """Largest relative change of a head's certificate of q, k or v at the last refresh, and the place of its layer.

    A certificate is √d·σ of the head's weights, gain included, plus its offset, and every scale is read off one. It is an upper
    bound computed from the weights alone, without a start vector: weights that did not move give the same bits, and so 0. (A power
    iteration's estimate, which starts from the last refresh's vectors, still converges while the weights rest.) Of W → (1 + ε)W
    it is ε. |new − old| is divided by the larger of the two, so it is at most 1.

    A layer counts as 0 that was not measured twice in one mode (dropout of adapters widens certificates in training) on one device.
    Waits for the device once.
    """
    changes, places = [], []
    for place, layer in enumerate(layers):
        if layer.geometry is None or layer.bounds_before is None:
            continue
        for old, new in zip(layer.bounds_before, _bounds(layer.geometry), strict=True):
            larger = torch.maximum(old, new)
            changes.append(((new - old).abs() / torch.where(larger > 0, larger, 1.0)).amax())
            places.append(place)
    if not changes:
        return 0.0, 0
    values = torch.stack([x.to(changes[0].device) for x in changes]).tolist()
    worst = max(range(len(values)), key=values.__getitem__)
    return values[worst], places[worst]
