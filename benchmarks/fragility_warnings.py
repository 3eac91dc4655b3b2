"""The early-warning rule on several signals of a run, each at a ratio calibrated on stable runs with seeds of their own."""

from collections.abc import Sequence
from math import inf, isfinite
from statistics import median

from hf_geoscale import EarlyWarning

RULE = {"span": 4, "warm_up": 24, "memory": 32}
"""`EarlyWarning`'s defaults but for the ratio, chosen on runs of a smaller GPT-2 with the tuning seeds."""

SIGNALS = ("κ_softmax", "κ_softmax of v1", "loss", "gradient norm")
TUNING_SEEDS = (10, 11)
LEAST_RATIO = 1.001
"""For a signal that never left its past while tuned: a ratio must be above 1."""


def excess(values: Sequence[float]) -> float:
    """Largest running maximum over the median of its past: the least ratio at which a finite series never warns."""
    rule, worst = EarlyWarning(**RULE, ratio=inf), 1.0
    for value in values:
        if not isfinite(value):
            return inf
        if len(rule.past) >= rule.warm_up:
            worst = max(worst, max(*rule.recent, value) / median(rule.past))
        rule.observe(value)
    return worst


def calibrated(tuning: list[dict]) -> dict[str, float]:
    """Ratio of each signal: the least one at which no tuning run has a warning."""
    return {name: max(LEAST_RATIO, *(excess(run["signals"][name]) for run in tuning)) for name in SIGNALS}


def warned(run: dict, ratios: dict[str, float]) -> dict[str, list[int]]:
    """Steps at which each signal of a run warned."""
    found = {}
    for name, ratio in ratios.items():
        rule = EarlyWarning(**RULE, ratio=ratio)
        pairs = zip(run["observed"], run["signals"][name], strict=True)
        found[name] = [step for step, value in pairs if rule.observe(value)]
    return found


def with_warnings(records: list[dict]) -> tuple[dict[str, float], list[dict]]:
    """The calibrated ratios, and the planted runs, those of the tuning left out, with their warnings."""
    planted = [r for r in records if r["kind"] == "planted"]
    ratios = calibrated([r for r in planted if r["run"] == "tuning"])
    return ratios, [r | {"warned": warned(r, ratios)} for r in planted if r["run"] != "tuning"]
