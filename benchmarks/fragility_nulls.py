"""Rank correlation of two series and what chance alone makes of series with memory."""

import math
from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks around 0, ties sharing their mean: whole or half numbers."""
    array = np.asarray(values, dtype=float)
    below, equal = (array[:, None] > array).sum(1), (array[:, None] == array).sum(1)
    return below + (equal - 1) / 2 - (len(array) - 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; 0 where a series is constant. From exact sums: without ties equal correlations are equal numbers."""
    a, b = ranks(x), ranks(y)
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else 0.0


def partial_spearman(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Rank correlation of x and y with what both owe to a third series taken out; 0 where that leaves nothing."""
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    left = (1 - xz**2) * (1 - yz**2)
    return float((xy - xz * yz) / np.sqrt(left)) if left > 1e-9 else 0.0


def circular_shift_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of all circular shifts of y, the identity among them, whose correlation with x is at least the observed one.

    One-sided; keeps each series' own memory, which permuting single entries would destroy. Never below 1/n. Two series with
    a common trend pass it whatever they have to do with each other: look at their differences too.
    """
    a, b = ranks(x), ranks(y)
    shifted = np.array([a @ np.roll(b, shift) for shift in range(len(b))])
    return float((shifted >= shifted[0]).mean())


def differences(x: Sequence[float]) -> np.ndarray:
    """Changes of the logarithm of a positive series from one observation to the next."""
    return np.diff(np.log(np.asarray(x, dtype=float)))
