"""The judge of the smoke suite: a scenario runs with and without hf_geoscale, and only what fails with it is a failure.

A scenario is a function of `patched`. Unpatched, it does the same with upstream's own attention.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import pytest
from packaging.version import Version
from torch import Tensor, nn

from hf_geoscale import geometry_report
from hf_geoscale.integrations.known_sources import RELEASES

from ..integrations.compare import relative
from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR

NEWEST_READ = RELEASES["transformers"].split(" to ")[-1]
"""Of transformers' minor releases whose attention forwards have fingerprints."""


@dataclass(frozen=True)
class Outcome:
    """What a run of a scenario gave."""

    outputs: dict[str, Tensor]  # of the attention: compared within OUTPUT_ERROR
    gradients: dict[str, Tensor]  # and updates that are linear in them: compared within GRADIENT_ERROR
    model: nn.Module  # whose attention ran


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def compare(scenario: Callable[[bool], Outcome], fused: bool = True) -> None:
    """Fail unless the patched run is upstream's within FP8's error, in FP8, through the fused front end where `fused`."""
    try:
        exact = scenario(False)
    except Exception as error:
        pytest.xfail(f"fails without hf_geoscale, too: {_line(error)}")
    ours = scenario(True)
    for kind, tolerance in (("outputs", OUTPUT_ERROR), ("gradients", GRADIENT_ERROR)):
        expected, got = getattr(exact, kind), getattr(ours, kind)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            error = relative(got[name], value)
            assert 0 < error < tolerance, f"{name}: {error:.4f} from upstream's own attention, allowed {tolerance:.4f}"
    for row in geometry_report(ours.model).rows:
        assert row["calls"] > 0, f"layer {row['layer']} made no FP8 call: {row}"
        assert row["overflows"] == 0
        assert set(row["fallback_reasons"]) <= {"kv_cache"}, row["fallback_reasons"]
        if fused:
            _judge_front_end(row)


def _judge_front_end(row: dict) -> None:
    """The fused front end, or a release of transformers whose forwards nobody has read yet: that is said, and is no failure."""
    if row["front_end"] == "fused":
        assert row["front_end_calls"] > 0, f"layer {row['layer']} never took its fused front end: {row}"
        return
    said = f"layer {row['layer']} goes through the interface: {row['front_end']}"
    installed, read = (Version(text).release[:2] for text in (version("transformers"), NEWEST_READ))
    assert installed > read, said
    warnings.warn(
        f"transformers {version('transformers')} is newer than {NEWEST_READ}, the last that was read: {said}",
        stacklevel=2,
    )


def run(command: Callable[[bool], None]) -> None:
    """Fail if a command fails that has nothing to compare, unless it fails without hf_geoscale, too."""
    try:
        command(True)
    except Exception as ours:
        try:
            command(False)
        except Exception as control:
            pytest.xfail(f"fails without hf_geoscale, too: {_line(control)} (with it: {_line(ours)})")
        raise
