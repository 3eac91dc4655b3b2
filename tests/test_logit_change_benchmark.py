"""What benchmarks/logit_change.py calls diverged, and that its page is what its records say."""

import importlib.util
import json
import math
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parent.parent
ENTROPY = 3.2


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("logit_change_report", ROOT / "benchmarks" / "logit_change_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(held_out, rate=0.01, seed=0, control="plain", losses=None) -> dict:
    probes = [[10 * i, loss, 2.0 + i] for i, loss in enumerate(held_out, 1)]
    named = {"control": control, "attention": "FP8", "optimizer": "Muon", "rate": rate, "seed": seed, "steps": 3}
    shape = {"layers": 4, "width": 256, "batch": 16, "length": 256, "overflows": 0, "clipped_heads": 0}
    return named | shape | {"losses": losses or [3.0, 2.5, 2.0], "probes": probes}


STABLE = [3.0, 2.0, 2.05]
LITTLE = [3.3, 2.95, 2.91]
DIVERGED = {
    "risen": {"held_out": [3.0, 2.0, 2.11]},
    "risen above the loss before the first step": {"held_out": [5.5, 5.61]},
    "a loss that is not finite": {"held_out": STABLE, "losses": [3.0, math.nan, 2.0]},
    "a probe that is not finite": {"held_out": [3.0, math.inf, 2.0]},
    "ended early": {"held_out": STABLE, "losses": [3.0, 2.5]},
    "ended before a probe": {"held_out": [], "losses": [3.0]},
}
HOST = dict.fromkeys(("command", "device", "driver", "torch", "triton", "transformers", "commit"), "x")
HOST |= {"byte_entropy": ENTROPY, "threshold": 100.0, "runs": 6}


def test_a_stable_run(report):
    assert not report.diverged(record(STABLE))
    assert not report.learnt_little(record(STABLE), ENTROPY)


@pytest.mark.parametrize("reason", DIVERGED)
def test_diverged_runs(report, reason):
    run = record(**DIVERGED[reason])
    assert report.diverged(run)
    assert not report.learnt_little(run, ENTROPY)
    page = report.to_markdown(HOST, [run])
    assert "(1/1 diverged)" in page
    assert (
        "- Muon, FP8 attention: 1 of the 1 runs diverged; highest stable rates: plain none. Highest rates that train: plain none."
        in page
    )


def test_learning_too_little_is_marked_and_no_divergence(report):
    run = record(LITTLE)
    assert not report.diverged(run)
    assert report.learnt_little(run, ENTROPY)
    page = report.to_markdown(HOST, [run])
    assert "| FP8 | plain | ≥ 0.01 | none | 2.910° | 0 | – |" in page
    assert "none of the 1 runs diverged: the highest stable rate was not found" in page
    assert "Highest rates that train: plain none." in page


def test_the_highest_stable_rate_is_below_the_first_divergence_of_any_seed(report):
    runs = [record(STABLE, rate, seed) for rate in (0.3, 0.1, 0.01) for seed in (0, 1)]
    (sweep,) = report.sweeps(runs).values()
    assert report.highest_stable_rate(sweep) == 0.3
    assert "| plain | ≥ 0.3 | ≥ 0.3 |" in report.to_markdown(HOST, runs)
    runs[2] = record(DIVERGED["risen"]["held_out"], 0.1)
    (sweep,) = report.sweeps(runs).values()
    assert report.highest_stable_rate(sweep) == 0.01
    page = report.to_markdown(HOST, runs)
    assert (
        "| FP8 | plain | 0.01 | ≥ 0.3 | 2.050 ± 0.000 | 2.080 ± 0.042 (1/2 diverged) | 2.050 ± 0.000 | 0 | – |" in page
    )
    assert "1 of the 6 runs diverged; highest stable rates: plain 0.01. Highest rates that train: plain ≥ 0.3." in page
    assert page == report.to_markdown(HOST, runs[::-1])


def test_the_highest_rate_that_trains_may_lie_above_one_that_does_not(report):
    runs = [record(LITTLE, 0.01), record(STABLE, 0.1), record(STABLE, 0.1, 1), record(LITTLE, 0.3)]
    (sweep,) = report.sweeps(runs).values()
    assert report.highest_training_rate(sweep, ENTROPY) == 0.1
    runs[2] = record(LITTLE, 0.1, 1)
    (sweep,) = report.sweeps(runs).values()
    assert report.highest_training_rate(sweep, ENTROPY) is None


def test_the_page_is_rendered_from_its_records(report):
    path = ROOT / "docs" / "logit_change.jsonl"
    if not path.exists():
        pytest.skip("docs/logit_change.jsonl is made on a GPU, and has not been")
    host, *records = (json.loads(line) for line in path.read_text().splitlines())
    assert report.to_markdown(host, records) == path.with_suffix(".md").read_text()


def test_what_the_readme_says_of_the_sweep(report):
    """Both methods end below plain training at every rate of Muon, bear four times its rate in FP8; the q/k norm ends lower."""
    _, *records = (json.loads(line) for line in (ROOT / "docs" / "logit_change.jsonl").read_text().splitlines())
    found = report.sweeps(records)
    ours = ("QuacK, τ = 1", "QuacK, τ = 0.1", "QK-Clip, certificate")

    def ends(attention: str, control: str) -> list[float]:
        return [fmean(run["probes"][-1][1] for run in runs) for runs in found["Muon", attention, control].values()]

    for attention in ("BF16", "FP8"):
        for control in ours:
            below = [a < b for a, b in zip(ends(attention, control), ends(attention, "plain"), strict=True)]
            normed = [a < b for a, b in zip(ends(attention, "q/k norm"), ends(attention, control), strict=True)]
            assert all(below)
            assert all(normed[:-1])
    plain = report.highest_stable_rate(found["Muon", "FP8", "plain"])
    assert all(report.highest_stable_rate(found["Muon", "FP8", control]) == 4 * plain for control in ours)
    assert sum(report.diverged(record) for record in records if record["optimizer"] == "AdamW") == 1
