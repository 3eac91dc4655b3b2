"""What an attention call saw: overflow counts and the share of each range in use. Tensors, so that no call waits for a GPU."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..scaling.formats import E4M3
from .counters import amax_of, overflow_of

CASTS_KEPT = 32
"""Calls whose counts are added up together."""


class AttentionStatistics:
    """Running totals over calls since the last `reset`; all on the operands' device.

    `range_used` maps "q", "k", "v" to (H,): the largest |x·quant_scale| / 448 seen per head; above 1 is an overflow. "logit",
    (Hq,), is there with quantised logits. `latest` has the same of the last call alone.
    `logit_amax` is (Hq,): the largest visible |q·k|·softmax_scale, before any soft cap, or None unless `observe_logits`.
    """

    def __init__(self, observe_logits: bool = False):
        self.observe_logits = observe_logits
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
    ) -> None:
        """Add what a fused forward counted: added up when somebody reads it, or with that of many calls."""
        if counts != self._counts:
            self._fold_casts()
            fold_ranges([self])
        self._casts.append(buffer)
        self._counts, self._latest_casts = counts, buffer
        if len(self._casts) >= CASTS_KEPT or torch.compiler.is_compiling():  # guards would follow the length of a list
            self._fold_casts()

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
        self._widen(operand, used)

    def _widen(self, operand: str, used: Tensor) -> None:
        old = self._range_used.get(operand)
        self._range_used[operand] = used if old is None else torch.maximum(_on_device_of(used, old), used)

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
        if self._cast_overflow is not None:
            for operand, count in zip(("q", "k", "v", "logit"), self._cast_overflow.tolist(), strict=True):
                counts[operand] = counts.get(operand, 0) + count
        if self._gradient_overflow is not None:
            counts["logit gradient"] = counts.get("logit gradient", 0) + int(self._gradient_overflow)
        return counts

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
        for operand, share in _by_operand(used, s._counts).items():
            s._widen(operand, share)


def _by_operand(x: Tensor, counts: tuple[int, int, int]) -> dict[str, Tensor]:
    return dict(zip("qkv", torch.split_with_sizes(x, counts), strict=True))


def _on_device_of(x: Tensor, old: Tensor) -> Tensor:
    return old if old.device == x.device else old.to(x.device)
