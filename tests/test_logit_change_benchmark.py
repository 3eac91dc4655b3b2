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
HOST |= {"byte_entropy": ENTROPY, "threshold": 100.0, "runs": 6, "history": "Nothing before."}


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
    readme = " ".join((ROOT / "README.md").read_text().split())
    _, *records = (json.loads(line) for line in (ROOT / "docs" / "logit_change.jsonl").read_text().splitlines())
    found = report.sweeps(records)
    ours, fixed = ("QuacK, τ = 1", "QuacK, τ = 0.1", "QK-Clip, certificate"), "fixed factor, τ = 0.1"

    def ends(attention: str, control: str) -> list[float]:
        return [fmean(run["probes"][-1][1] for run in runs) for runs in found["Muon", attention, control].values()]

    def stable(attention: str, control: str) -> float:
        return report.highest_stable_rate(found["Muon", attention, control])

    assert "both end below plain training at every rate, as does a fixed factor of 0.1 on the same update" in readme
    assert "which ends lowest of them at the lowest rate" in readme
    assert "A q/k norm, where the model may have one, ends lower still at all but the highest rate" in readme
    for attention in ("BF16", "FP8"):
        for control in (*ours, fixed):
            assert all(a < b for a, b in zip(ends(attention, control), ends(attention, "plain"), strict=True))
            assert all(
                a < b for a, b in zip(ends(attention, "q/k norm")[:-1], ends(attention, control)[:-1], strict=True)
            )
        assert min((*ours, fixed), key=lambda control: ends(attention, control)[0]) == fixed
    assert "with FP8 attention both bear a rate four times plain training's" in readme
    assert all(stable("FP8", control) == 4 * stable("FP8", "plain") for control in ours)
    assert "with BF16 attention QuacK at τ = 1 and the clip bear the same" in readme
    assert all(stable("BF16", control) == stable("BF16", "plain") for control in (ours[0], ours[2]))
    assert "though with BF16 attention it diverges earlier" in readme
    assert stable("BF16", "q/k norm") < stable("BF16", "plain")
    assert "With AdamW next to no run of any method diverged" in readme
    assert sum(report.diverged(record) for record in records if record["optimizer"] == "AdamW") == 1
