"""What a forward pass counts as it runs: sections of one buffer, so that one launch sets all of them to zero."""

from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 4
"""Entries of float32 that every section starts at a multiple of: 16 bytes, which Triton compiles wide loads for."""

OVERFLOW = 8
"""Entries of float32 that hold four counts in int64."""


class Counters(NamedTuple):
    """Views of the sections, zeros behind what they hold; those that a call does not ask for are empty."""

    overflow: Tensor  # (4,) int64: entries of q, k, v and logits that their cast saturated
    amax: Tensor  # (Hq + 2·Hkv or more,) largest |x·quant_scale| of q, k and v by head
    logit_max: Tensor  # (Hq or more,) in natural units, before the soft cap and rounding
    v_norm: Tensor  # (B·Hkv,) largest 2-norm of a row of v8


def _sections(batch: int, heads: int, kv_heads: int, count: bool, observe: bool) -> tuple[int, int, int, int]:
    """Lengths in float32. What grows with the batch comes last, so that the others stay where they are."""
    ranges = _aligned(heads + 2 * kv_heads) if count else 0
    return OVERFLOW if count else 0, ranges, _aligned(heads) if observe else 0, batch * kv_heads


def _aligned(length: int) -> int:
    return length + -length % ALIGNMENT


def length_of(batch: int, heads: int, kv_heads: int, count: bool, observe: bool) -> int:
    """N of the buffer of `zeroed`."""
    return sum(_sections(batch, heads, kv_heads, count, observe))


def zeroed(batch: int, heads: int, kv_heads: int, count: bool, observe: bool, device: torch.device) -> Tensor:
    """The buffer of one call, (N,) float32.

    Args:
        count: with `overflow` and `amax`.
        observe: with `logit_max`.
    """
    return torch.zeros(length_of(batch, heads, kv_heads, count, observe), dtype=torch.float32, device=device)


def empty_like_zeroed(x: Tensor, batch: int, heads: int, kv_heads: int, count: bool, observe: bool) -> Tensor:
    """As `zeroed`, without values, for fake tensors."""
    return x.new_empty(length_of(batch, heads, kv_heads, count, observe), dtype=torch.float32)


def counters_of(
    buffer: Tensor,  # (N,) of `zeroed`
    batch: int,
    heads: int,
    kv_heads: int,
    count: bool,
    observe: bool,
) -> Counters:
    parts = torch.split_with_sizes(buffer, _sections(batch, heads, kv_heads, count, observe))
    return Counters(parts[0].view(torch.int64), *parts[1:])


def overflow_of(
    buffer: Tensor,  # (N,) of `zeroed`, with `count`
) -> Tensor:
    return buffer[:OVERFLOW].view(torch.int64)


def amax_of(
    buffer: Tensor,  # (N,) of `zeroed`, with `count`
    counts: tuple[int, int, int],  # heads of q, k and v
) -> Tensor:
    """`Counters.amax` without the zeros behind it, (Hq + 2·Hkv,)."""
    return buffer[OVERFLOW : OVERFLOW + sum(counts)]


def v_norm_of(buffer: Tensor, batch: int, kv_heads: int) -> Tensor:
    """The section that a backward reads, (B·Hkv,), whatever else the forward counted."""
    return buffer[buffer.shape[0] - batch * kv_heads :]
