"""What an attention call saw: overflow counts and the share of each range in use. Tensors, so that no call waits for a GPU."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..scaling.formats import E4M3
from .backend import fused_kernels, stream_of
from .counters import amax_of, overflow_of

CASTS_KEPT = 32
"""Calls whose counts are added up together."""


class Earlier:
    """What calls of several layers counted before their statistics started over (`shared_counters`): a row a layer."""

    def __init__(self, overflow: Tensor, amax: Tensor, counts: tuple[int, int, int]):
        self.overflow = overflow  # (L, 4) int64
        self.amax = amax  # (L, Hq + 2·Hkv) in FP8 units
        self.counts = counts

    def has_rows_of(
        self, statistics: Sequence["AttentionStatistics"], counts: tuple[int, int, int], device: torch.device
    ) -> bool:
        """Whether these are all its rows, in order, and it can take counts from this device."""
        if (self.overflow.shape[0], self.overflow.device, self.counts) != (len(statistics), device, counts):
            return False
        return all(s.is_row(self, row) for row, s in enumerate(statistics))

    def add(self, overflow: Tensor, amax: Tensor) -> None:
        self.overflow = self.overflow + overflow
        self.amax = torch.maximum(self.amax, amax)

    def take_ranges(self, row: int) -> dict[str, Tensor]:
        """Shares of the range by operand since this was called last for a layer."""
        shares = _by_operand(self.amax[row] / E4M3.max, self.counts)
        self.amax[row] = 0
        return shares


class Interval:
    """What calls of one layer between two `start_over`s used of the range.

    Args:
        ranges: shares by operand, or None where `amax` holds them.
        amax: (L, Hq + 2·Hkv) in FP8 units, of which `row` is this layer's.
        counts: heads of q, k and v.
        logit_amax: (Hq,) as `AttentionStatistics.logit_amax`.
    """

    def __init__(
        self,
        ranges: dict[str, Tensor] | None,
        amax: Tensor | None,
        row: int,
        counts: tuple[int, int, int],
        logit_amax: Tensor | None,
    ):
        self._ranges, self._amax, self._row, self._counts, self.logit_amax = ranges, amax, row, counts, logit_amax

    def ranges(self) -> dict[str, Tensor]:
        """Shares of the range by operand, (H,) each."""
        if self._ranges is None and self._amax is not None:
            return _by_operand(self._amax[self._row] / E4M3.max, self._counts)
        return self._ranges or {}


class AttentionStatistics:
    """Running totals over calls since the last `reset`; all on the operands' device. Ranges start over with `start_over`.

    `range_used` maps "q", "k", "v" to (H,): the largest |x·quant_scale| / 448 seen per head; above 1 is an overflow. "logit",
    (Hq,), is there with quantised logits. `latest` has the same of the last call alone, until ranges start over.
    `logit_amax` is (Hq,): the largest visible |q·k|·softmax_scale, before any soft cap, or None unless `observe_logits`.
    `kernels` is what ran the last call that no compiler traced: a name of `backend.kernels_on`; None before one.
    """

    def __init__(self, observe_logits: bool = False):
        self.observe_logits = observe_logits
        self.kernels: str | None = None
        self.reset()

    def reset(self) -> None:
        self._overflow: dict[str, Tensor] = {}
        self._cast_overflow: Tensor | None = None
        self._range_used: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._casts: list[Tensor] = []  # what fused forwards counted and `_cast_overflow` is still to be told
        self._ranged = 0  # how many of these `_amax` was told
        self._amax: Tensor | None = None  # of q, k and v in FP8 units: what `_range_used` is still to be told
        self._latest_casts: Tensor | None = None
        self._counts: tuple[int, int, int] = (0, 0, 0)  # heads of q, k and v in all of these
        self.earlier: Earlier | None = None  # calls before `start_over`, if they were counted together
        self._row = 0  # of these
        self._untaken = False  # whether ranges are in that row
        self.before: Interval | None = None  # the last calls before `start_over`
        self._earlier_ranges: dict[str, Tensor] = {}  # those that are not
        self._spare: tuple[Tensor, int] | None = None  # zeros for the next call's counters, their stream
        self.logit_amax: Tensor | None = None
        self._gradient_overflow: Tensor | None = None

    def gradient_counter(self, device: torch.device) -> Tensor:
        """(1,) int64 to which a fused backward adds its overflows, in place."""
        if self._gradient_overflow is None or self._gradient_overflow.device != device:
            with torch.inference_mode(False):  # a later backward writes to it
                self._gradient_overflow = torch.zeros(1, dtype=torch.int64, device=device)
        return self._gradient_overflow

    def add_overflow(self, operand: str, count: Tensor) -> None:
        """Add to an operand's count, (): "q", "k", "v", "logit" or "logit gradient"."""
        old = self._overflow.get(operand)
        self._overflow[operand] = count if old is None else old.to(count.device) + count

    def add_casts(
        self,
        buffer: Tensor,  # (N,) of `counters.zeroed`, with what a fused forward counted
        counts: tuple[int, int, int],  # heads of q, k and v
        call: tuple | None = None,  # arguments of `fused_kernels`
    ) -> None:
        """Add what a fused forward counted: added up when somebody reads it, or with that of many calls."""
        if counts != self._counts:
            self._fold_casts()
            fold_ranges([self])
        self._casts.append(buffer)
        self._counts, self._latest_casts = counts, buffer
        compiling = torch.compiler.is_compiling()
        if len(self._casts) >= CASTS_KEPT or compiling:  # guards would follow the length of a list
            self._fold_casts()
        if call is not None and not compiling:
            self.kernels = fused_kernels(*call).name

    @property
    def casts(self) -> list[Tensor]:
        """Buffers of calls that were not added up yet, each (N,)."""
        return self._casts

    @property
    def counts(self) -> tuple[int, int, int]:
        """Heads of q, k and v in these."""
        return self._counts

    @property
    def holds_calls_alone(self) -> bool:
        """Whether `casts` are all there is of the calls since ranges started over."""
        return bool(self._casts) and not self._ranged and self._amax is None and not self._range_used

    def is_row(self, earlier: Earlier, row: int) -> bool:
        return self.earlier is earlier and self._row == row

    def buffer(self, length: int, device: torch.device) -> Tensor | None:
        """Zeros for the counters of a call, (length,), if some lie ready."""
        spare = self._spare
        if spare is None or torch.compiler.is_compiling():
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # a graph would write to them ever after
        self._spare = None
        zeros, stream = spare
        return zeros if zeros.shape[0] == length and zeros.device == device and stream == stream_of(device) else None

    def hand_over(self, earlier: Earlier, row: int, spare: Tensor, amax: Tensor) -> None:
        """Leave the buffers of calls, which `earlier` has taken up, for one of zeros.

        Args:
            amax: (L, Hq + 2·Hkv) of these calls alone, in FP8 units; kept as `before`.
        """
        self.before = Interval(None, amax, row, self._counts, self.logit_amax)
        if not self.is_row(earlier, row):
            self._leave_row()
        self.earlier, self._row, self._untaken = earlier, row, True
        self._spare = spare, stream_of(spare.device)
        self._casts, self._ranged, self._latest, self._latest_casts = [], 0, {}, None
        self.logit_amax = None

    def keep_earlier(self) -> None:
        """Set `range_used`, which `fold_ranges` has brought up to date, aside for `take_earlier`, without other layers."""
        self._fold_casts()
        if self._range_used:
            self.before = Interval(self._range_used, None, 0, self._counts, self.logit_amax)
        _widen(self._earlier_ranges, self._range_used)
        self._range_used, self.logit_amax, self._spare = {}, None, None
        self._latest, self._latest_casts = {}, None

    def take_earlier(self) -> dict[str, Tensor]:
        """Shares of the range, by operand, that calls before `start_over` used, since this was asked last."""
        ranges, self._earlier_ranges = self._earlier_ranges, {}
        if self.earlier is not None and self._untaken:
            self._untaken = False
            _widen(ranges, self.earlier.take_ranges(self._row))
        return ranges

    def _leave_row(self) -> None:
        """Keep what is in a row of `earlier` without it."""
        self._earlier_ranges = self.take_earlier()
        if self.earlier is not None:
            row, old = self.earlier.overflow[self._row], self._cast_overflow
            self._cast_overflow = row if old is None else _on_device_of(row, old) + row
        self.earlier = None

    def _fold_amax(self) -> None:
        if self._ranged == len(self._casts):
            return
        new = [amax_of(buffer, self._counts) for buffer in self._casts[self._ranged :]]
        self._ranged = len(self._casts)
        new += [] if self._amax is None else [self._amax]
        self._amax = new[0] if len(new) == 1 else torch.stack([_on_device_of(new[0], x) for x in new]).amax(0)

    def _fold_casts(self) -> None:
        """Bring `_cast_overflow` and `_amax` up to date."""
        self._fold_amax()
        new = [overflow_of(buffer) for buffer in self._casts]
        self._casts, self._ranged = [], 0
        new += [] if self._cast_overflow is None else [self._cast_overflow]
        if new:
            self._cast_overflow = torch.stack([_on_device_of(new[0], x) for x in new]).sum(0)

    def add_range(self, operand: str, used: Tensor) -> None:
        self.latest[operand] = used  # after what earlier calls counted
        _widen(self._range_used, {operand: used})

    @property
    def range_used(self) -> dict[str, Tensor]:
        fold_ranges([self])
        return self._range_used

    @range_used.setter
    def range_used(self, used: dict[str, Tensor]) -> None:
        self._range_used, self._amax, self._ranged = used, None, len(self._casts)

    @property
    def latest(self) -> dict[str, Tensor]:
        if self._latest_casts is not None:
            self._latest |= _by_operand(amax_of(self._latest_casts, self._counts) / E4M3.max, self._counts)
            self._latest_casts = None
        return self._latest

    def add_logits(self, amax: Tensor) -> None:
        old = self.logit_amax
        self.logit_amax = amax if old is None else torch.maximum(_on_device_of(amax, old), amax)

    @property
    def overflows_by_operand(self) -> dict[str, int]:
        """Values beyond ±448 before the cast of each operand, as numbers; waits for the device."""
        self._fold_casts()
        counts = {operand: int(count) for operand, count in self._overflow.items()}
        earlier = None if self.earlier is None else self.earlier.overflow[self._row]
        for casts in (self._cast_overflow, earlier):
            if casts is not None:
                for operand, count in zip(("q", "k", "v", "logit"), casts.tolist(), strict=True):
                    counts[operand] = counts.get(operand, 0) + count
        if self._gradient_overflow is not None:
            counts["logit gradient"] = counts.get("logit gradient", 0) + int(self._gradient_overflow)
        return counts

    @property
    def total(self) -> Tensor | None:
        """Overflow count of all operands, () int64, without waiting for the device; None before a call."""
        self._fold_casts()
        counts = list(self._overflow.values())
        if self._cast_overflow is not None:
            counts.append(self._cast_overflow.sum())
        if self.earlier is not None:
            counts.append(self.earlier.overflow[self._row].sum())
        if self._gradient_overflow is not None:
            counts.append(self._gradient_overflow[0])
        return torch.stack([_on_device_of(counts[0], x) for x in counts]).sum() if counts else None

    @property
    def overflows(self) -> int:
        """Overflow count of all operands as a number; waits for the device."""
        return sum(self.overflows_by_operand.values())


def fold_ranges(statistics: Iterable[AttentionStatistics]) -> None:
    """Bring `range_used` of each up to date, in one division for all of them."""
    statistics = list(statistics)
    for s in statistics:
        s._fold_amax()
    behind = [(s, s._amax) for s in statistics if s._amax is not None]
    shares = torch._foreach_div([amax for _, amax in behind], E4M3.max) if behind else ()
    for (s, _), used in zip(behind, shares, strict=True):
        s._amax = None
        _widen(s._range_used, _by_operand(used, s._counts))


def _widen(ranges: dict[str, Tensor], used: dict[str, Tensor]) -> None:
    for operand, share in used.items():
        old = ranges.get(operand)
        ranges[operand] = share if old is None else torch.maximum(_on_device_of(share, old), share)


def _by_operand(x: Tensor, counts: tuple[int, int, int]) -> dict[str, Tensor]:
    return dict(zip("qkv", torch.split_with_sizes(x, counts), strict=True))


def _on_device_of(x: Tensor, old: Tensor) -> Tensor:
    return old if old.device == x.device else old.to(x.device)
