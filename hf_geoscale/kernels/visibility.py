"""Which keys a query row may see, in memory linear in the sequence length.

Causal, sliding-window, padded and packed attention all show each row one contiguous range of keys. `key_range` states it:
(B, Lq, 2) integers, row i of sequence b sees keys start ≤ j < stop; start ≥ stop is an empty row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_BLOCK = 64
"""Query rows that the reference handles at a time."""


@dataclass(frozen=True)
class Visibility:
    """A mask: the intersection of causal, window and key_range, for Lq query rows and Lk keys.

    Query row i stands at key position i + Lk − Lq (the last row sees the last key), as FlashAttention aligns them.
    """

    query_length: int
    key_length: int
    causal: bool = True
    window: int | None = None  # a row sees at most this many keys, itself included; needs causal
    key_range: Tensor | None = None  # (B, Lq, 2)

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """First and one-past-last visible key of query rows start … stop − 1: (B or 1, stop − start, 2) int64."""
        positions = torch.arange(start, stop, device=device) + (self.key_length - self.query_length)
        last = positions + 1 if self.causal else torch.full_like(positions, self.key_length)
        first = torch.zeros_like(positions) if self.window is None else positions - self.window + 1
        bounds = torch.stack([first.clamp_min(0), last.clamp(0, self.key_length)], dim=-1)[None]
        if self.key_range is None:
            return bounds
        given = self.key_range[:, start:stop].to(device=device, dtype=torch.int64)
        return torch.stack(
            [torch.maximum(bounds[..., 0], given[..., 0]), torch.minimum(bounds[..., 1], given[..., 1])], dim=-1
        )

    def blocks(self, device: torch.device):
        """Yield (row slice, key slice, visible) per block of rows; visible is (B or 1, rows, keys) bool.

        The key slice starts at a multiple of 4 and covers every key that a row of the block sees.
        """
        for start in range(0, self.query_length, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, self.query_length)
            bounds = self.rows(start, stop, device)
            first, last = int(bounds[..., 0].amin()) // 4 * 4, int(bounds[..., 1].amax())
            if first >= last:  # no row of the block sees any key: keep one hidden tile, so that shapes stay valid
                first, last = 0, min(4, self.key_length)
            keys = torch.arange(first, last, device=device)
            visible = (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])
            yield slice(start, stop), slice(first, last), visible

    def dense(self, device: torch.device) -> Tensor:
        """The whole mask, (B or 1, 1, Lq, Lk) bool, for libraries that need one. Quadratic memory."""
        bounds = self.rows(0, self.query_length, device)[:, None]
        keys = torch.arange(self.key_length, device=device)
        return (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])


def key_range_of_block(
    visible: Tensor,  # (B, R, Lk) bool
) -> tuple[Tensor, Tensor]:
    """Range of visible keys per row (B, R, 2), and whether every row's keys are contiguous () bool."""
    length = visible.shape[-1]
    count = visible.sum(-1)
    first = visible.to(torch.int8).argmax(-1)
    last = length - visible.flip(-1).to(torch.int8).argmax(-1)
    bounds = torch.stack([first, torch.where(count > 0, last, first)], dim=-1)
    return bounds, ((bounds[..., 1] - bounds[..., 0]) == count).all()
