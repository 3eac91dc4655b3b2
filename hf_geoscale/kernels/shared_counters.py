"""Counters of the layers of a model together: one tensor for the next calls of all, and their counts added up in a few operations.

Alone each call would allocate and zero a buffer of its own, and keep it until somebody adds it up.
"""

from collections.abc import Sequence

import torch

from .counters import ALIGNMENT, OVERFLOW
from .statistics import AttentionStatistics, Earlier, fold_ranges


def start_over(statistics: Sequence[AttentionStatistics]) -> None:
    """Let `range_used` and `logit_amax` of each be of calls from now on; what was used so far is left to `take_earlier`.

    Where each saw as many calls since the last time, of the same shape, as in training, their next calls get buffers that are
    rows of one tensor, zeros by now.
    """
    if not _alike(statistics):
        fold_ranges(statistics)
        for s in statistics:
            s.keep_earlier()
        return
    counts, (length,), device = statistics[0].counts, statistics[0].casts[0].shape, statistics[0].casts[0].device
    calls = torch.stack([buffer for s in statistics for buffer in s.casts]).view(len(statistics), -1, length)
    overflow = calls[..., :OVERFLOW].clone(memory_format=torch.contiguous_format).view(torch.int64).sum(1)
    amax = calls[..., OVERFLOW : OVERFLOW + sum(counts)].amax(1)
    earlier = statistics[0].earlier
    if earlier is not None and earlier.has_rows_of(statistics, counts, device):
        earlier.add(overflow, amax)
    else:
        earlier = Earlier(overflow, amax.clone(), counts)
    spare = torch.zeros(len(statistics), length + -length % ALIGNMENT, dtype=torch.float32, device=device)
    for i, (s, row) in enumerate(zip(statistics, spare[:, :length].unbind(), strict=True)):
        s.hand_over(earlier, i, row, amax)


def _alike(statistics: Sequence[AttentionStatistics]) -> bool:
    """Whether each holds as many buffers of calls, all of one shape on one device, and nothing else."""
    if not statistics or not all(s.holds_calls_alone for s in statistics):
        return False
    counts, (buffer, *others) = statistics[0].counts, statistics[0].casts
    return all(
        s.counts == counts
        and len(s.casts) == 1 + len(others)
        and all(x.shape == buffer.shape and x.device == buffer.device for x in s.casts)
        for s in statistics
    )
