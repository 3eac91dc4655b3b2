"""What an attention call saw: overflow counts and the share of each range in use. Tensors, so that no call waits for a GPU."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..scaling.formats import E4M3


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
        self._amax: Tensor | None = None  # of q, k and v in FP8 units: what `_range_used` is still to be told
        self._latest_amax: Tensor | None = None
        self._counts: tuple[int, int, int] = (0, 0, 0)  # heads of q, k and v in these two
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
        overflow: Tensor,  # (4,) int64 of q, k, v and logits
        amax: Tensor,  # (Hq + 2·Hkv or more,) largest |x·quant_scale| of q, k and v
        counts: tuple[int, int, int],  # heads of q, k and v
    ) -> None:
        """Add what a fused forward counted. Ranges are divided and taken apart only when somebody reads them."""
        old = self._cast_overflow
        # The first is cloned: torch.save refuses storage that tensors of two dtypes view.
        self._cast_overflow = overflow.clone() if old is None else _on_device_of(overflow, old) + overflow
        self._counts, self._latest_amax = counts, amax
        self._amax = amax if self._amax is None else torch.maximum(_on_device_of(amax, self._amax), amax)

    def add_range(self, operand: str, used: Tensor) -> None:
        self._latest[operand] = used
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
        self._range_used, self._amax = used, None

    @property
    def latest(self) -> dict[str, Tensor]:
        if self._latest_amax is not None:
            self._latest |= _by_operand(self._latest_amax / E4M3.max, self._counts)
            self._latest_amax = None
        return self._latest

    def add_logits(self, amax: Tensor) -> None:
        old = self.logit_amax
        self.logit_amax = amax if old is None else torch.maximum(_on_device_of(amax, old), amax)

    @property
    def overflows_by_operand(self) -> dict[str, int]:
        """Values beyond ±448 before the cast of each operand, as numbers; waits for the device."""
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
    behind = [(s, s._amax) for s in statistics if s._amax is not None]
    shares = torch._foreach_div([amax for _, amax in behind], E4M3.max) if behind else ()
    for (s, _), used in zip(behind, shares, strict=True):
        s._amax = None
        for operand, share in _by_operand(used, s._counts).items():
            s._widen(operand, share)


def _by_operand(x: Tensor, counts: tuple[int, int, int]) -> dict[str, Tensor]:
    parts = torch.split_with_sizes(x, (*counts, x.shape[0] - sum(counts)))
    return dict(zip("qkv", parts[:3], strict=True))


def _on_device_of(x: Tensor, old: Tensor) -> Tensor:
    return old if old.device == x.device else old.to(x.device)
