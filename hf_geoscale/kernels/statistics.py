"""What an attention call saw: overflow counts and the share of each range in use. Tensors, so that no call waits for a GPU."""

import torch
from torch import Tensor


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
        self.range_used: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
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

    def add_cast_overflow(self, counts: Tensor) -> None:
        """Add to the counts of q, k, v and logits, (4,) int64: what a fused forward counts, in one launch."""
        old = self._cast_overflow
        self._cast_overflow = counts if old is None else old.to(counts.device) + counts

    def add_range(self, operand: str, used: Tensor) -> None:
        self.latest[operand] = used
        old = self.range_used.get(operand)
        self.range_used[operand] = used if old is None else torch.maximum(old.to(used.device), used)

    def add_logits(self, amax: Tensor) -> None:
        old = self.logit_amax
        self.logit_amax = amax if old is None else torch.maximum(old.to(amax.device), amax)

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
