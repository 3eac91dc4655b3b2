"""Orthonormal Hadamard mix over the head dimension: spreads outliers, cancels in q·k."""

from functools import lru_cache

import torch
from torch import Tensor

SIGNS_MAX = 128
"""Widest matrix of signs that a kernel multiplies at once; a block of 256 adds one butterfly."""


def hadamard_block(dim: int) -> int:
    """Width of one Hadamard block: the largest power of two that divides `dim` (80 → 16, 96 → 32, 128 → 128)."""
    return dim & -dim


def hadamard(
    x: Tensor,  # (..., D)
) -> Tensor:
    """Multiply each block of D by the orthonormal Sylvester–Hadamard matrix; its own inverse. (..., D) float32.

    Butterflies rather than a matrix product: every row's result is the same bits whatever the batch around it.
    """
    block = hadamard_block(x.shape[-1])
    mixed, half = x.float(), 1
    while half < block:
        pairs = mixed.unflatten(-1, (-1, 2, half))
        even, odd = pairs.unbind(-2)
        mixed = pairs.new_empty(pairs.shape)
        mixed[..., 0, :] = even + odd
        mixed[..., 1, :] = even - odd
        mixed = mixed.flatten(-3)
        half *= 2
    return mixed * block**-0.5


@lru_cache(maxsize=64)
def hadamard_signs(width: int, block: int, device: torch.device) -> Tensor:
    """Block-diagonal matrix of ±1 (0 off the blocks), (width, width) bfloat16: what the fused kernels multiply by."""
    block, index = min(block, width), torch.arange(width)
    inside = index % block  # each block is the same matrix: a kernel may take a part of them
    bits = inside[:, None] & inside[None, :]
    for shift in (4, 2, 1):
        bits ^= bits >> shift
    signs = 1 - 2 * (bits & 1)
    return (signs * (index[:, None] // block == index[None, :] // block)).to(device=device, dtype=torch.bfloat16)
