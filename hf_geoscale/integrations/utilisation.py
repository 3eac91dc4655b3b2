"""How much of FP8's range the calls of a layer have used: running maxima that wait for no device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Utilisation:
    """Largest share of the range by operand and head, since the last `drain` and since patching.

    Shares are those of `AttentionStatistics.range_used`: "q", "k", "v" (H,) and, with quantised logits, "logit" (Hq,).
    """

    def __init__(self) -> None:
        self.interval: dict[str, Tensor] = {}
        self.earlier: dict[str, Tensor] = {}

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self.interval or self.earlier)

    def drain(self) -> Tensor | None:
        """Largest share of q, k and v since the last drain, (); None where there was no call."""
        drained, self.interval = self.interval, {}
        add_together([(self.earlier, drained)])
        return _largest([used for name, used in drained.items() if name != "logit"])

    def peak(self, *names: str) -> Tensor | None:
        """Largest share of these operands since patching: (); None where there was no call."""
        return _largest([seen[name] for seen in (self.interval, self.earlier) for name in names if name in seen])


def add_together(found: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """Add to each running maximum, by operand, what was used; in one operation for all of them."""
    olds, news, places = [], [], []
    for running, used in found:
        for name, new in used.items():
            old = running.get(name)
            if old is None:
                running[name] = new
            else:
                olds.append(old.to(new.device))
                news.append(new)
                places.append((running, name))
    if places:
        largest = torch._foreach_maximum(olds, news)
        for (running, name), value in zip(places, largest, strict=True):
            running[name] = value


def _largest(used: list[Tensor]) -> Tensor | None:
    return torch.stack([x.amax().to(used[0].device) for x in used]).amax() if used else None
