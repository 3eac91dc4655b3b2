"""Orthonormal Hadamard mix over the head dimension: spreads outliers, cancels in q·k."""

from torch import Tensor


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
