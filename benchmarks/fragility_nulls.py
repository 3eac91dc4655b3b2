"""Rank correlation of two series and what chance alone makes of series with memory."""

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    array = np.asarray(values, dtype=float)
    return np.array([(array < x).sum() + ((array == x).sum() - 1) / 2 for x in array])


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; 0 where a series is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def circular_shift_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of all circular shifts of y, the identity among them, whose correlation with x is at least the observed one.

    One-sided; keeps each series' own memory, which permuting single entries would destroy. Never below 1/n. Two series with
    a common trend pass it whatever they have to do with each other: look at their differences too.
    """
    observed, n = spearman(x, y), len(y)
    hits = sum(spearman(x, np.roll(y, shift)) >= observed - 1e-12 for shift in range(n))
    return hits / n


def differences(x: Sequence[float]) -> np.ndarray:
    """Changes of the logarithm of a positive series from one observation to the next."""
    return np.diff(np.log(np.asarray(x, dtype=float)))
