"""benchmarks/span_scaling.py: one tiny run an arm, equal tuning, and a page whose sentences follow the numbers."""
# ruff: noqa: E402  (scripts import each other as neighbours, so their folder is put on the path first)

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import span_scaling
import span_scaling_report as report
from span_scaling import PAIRS, QUICK, RATES, TUNING_SEEDS, RandomSpans, Run

PLAIN = (1.0, 1.0)


def records(span: float = 0.0, random: float = 0.0, seeds: int = 8) -> tuple[dict, list[dict]]:
    """A whole benchmark whose losses are made up: those of "span" and "random" lie that far from plain's."""
    shift = {"plain": 0.0, "uniform": 0.0, "span": span, "random": random}

    def record(run: Run) -> dict:
        wobble = 0.01 * ((run.seed * 7 + round(10 * sum(run.pair)) + len(run.arm)) % 5 - 2)
        loss = 2.0 + abs(run.rate - RATES[2]) + shift[run.arm] - 0.05 * (run.pair == PAIRS[3]) + wobble
        return {**vars(run), "held_out": loss, "overflows": 0, "seconds": 1.0, "commit": "abc"}

    found = [record(run) for run in span_scaling.tuning((PLAIN,), RATES, ("plain",), TUNING_SEEDS)]
    rates = span_scaling.rates_around(report.best_rate(found, "plain", PLAIN))
    found += [record(run) for run in span_scaling.tuning(PAIRS, rates, ("span", "random"), TUNING_SEEDS[:1])]
    found += [record(run) for seed in range(seeds) for run in span_scaling.comparison(found, seed)]
    host = span_scaling.host_of(replace(QUICK, seeds=seeds), "cpu", 1)
    return json.loads(json.dumps([host, found]))


@pytest.mark.cpu
class TestRuns:
    def test_every_arm_trains_and_starts_from_the_same_weights(self):
        losses = {}
        for arm, pair in (("plain", PLAIN), ("span", (2.0, 0.0)), ("random", (2.0, 0.0)), ("uniform", (2.0, 2.0))):
            first = {name: p.detach().clone() for name, p in self.model(arm, pair).named_parameters()}
            again = dict(self.model("plain", PLAIN).named_parameters())
            assert all(torch.equal(p, again[name]) for name, p in first.items())
            record = span_scaling.measure(Run("compare", arm, pair, 1e-2, 0), QUICK, "cpu")
            assert record["overflows"] == 0
            losses[arm] = record["held_out"]
        assert losses["plain"] < 5.5  # ln 256 = 5.545: nothing learnt
        assert len(set(losses.values())) == 4

    def model(self, arm: str, pair):
        return span_scaling.model_of(QUICK, Run("compare", arm, pair, 1e-2, 0), "cpu")

    def test_the_control_has_the_rank_of_the_operand_and_none_of_its_span(self):
        torch.manual_seed(0)
        x = torch.randn(400, 16, dtype=torch.float64)
        scaling = RandomSpans(1.0, 0.0)
        grad = torch.eye(400, dtype=torch.float64)
        projector = scaling.scale(grad, x)
        assert float(torch.linalg.matrix_rank(projector, rtol=0.1)) == 16
        inside = float((projector @ x).norm() ** 2 / x.norm() ** 2)
        assert inside == pytest.approx(16 / 400, rel=0.5)
        assert not torch.equal(scaling.scale(grad, x), projector)  # drawn anew

    def test_arms_are_tuned_alike_on_other_seeds(self):
        _, found = records()
        tuned = [r for r in found if r["phase"] == "tune"]
        counts = {arm: sum(r["arm"] == arm for r in tuned) for arm in ("plain", "span", "random")}
        assert counts == {"plain": 15, "span": 15, "random": 15}
        assert {r["rate"] for r in tuned if r["arm"] != "plain"} <= {r["rate"] for r in tuned if r["arm"] == "plain"}
        assert not {r["seed"] for r in tuned} & {r["seed"] for r in found if r["phase"] == "compare"}

    @pytest.mark.parametrize(("best", "expected"), [(0, (0, 1, 2)), (2, (1, 2, 3)), (4, (2, 3, 4))])
    def test_rates_stay_among_those_of_plain(self, best, expected):
        assert span_scaling.rates_around(RATES[best]) == tuple(RATES[i] for i in expected)

    def test_a_run_cut_off_loses_nothing_and_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(span_scaling.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=SameProcess))
        asked: list[Run] = []

        def measure(run: Run, setup, device) -> dict:
            if len(asked) == 40:
                raise KeyboardInterrupt
            asked.append(run)
            return vars(run) | {"held_out": 2.0 + run.rate, "overflows": 0, "seconds": 1.0}

        monkeypatch.setattr(span_scaling, "measure", measure)
        path, setup = tmp_path / "runs.jsonl", replace(QUICK, seeds=1)
        with pytest.raises(KeyboardInterrupt):
            span_scaling.measure_all(setup, "cpu", 1, 1.0, path)
        written = path.read_text().splitlines()
        assert len(written) == 1 + 40 - 1  # the warm-up is no record
        asked[:] = [run for run in asked if run.phase != "warm-up"][:10]  # room for what is missing
        records = span_scaling.measure_all(setup, "cpu", 1, 1.0, path)
        assert len({span_scaling.key(r) for r in records}) == len(records) == 45 + 2 + 2 * len(PAIRS)
        assert path.read_text().splitlines()[: len(written)] == written
        with pytest.raises(ValueError, match=r"holds runs with another steps; give another --output"):
            span_scaling.measure_all(replace(setup, steps=4), "cpu", 1, 1.0, path)


class SameProcess:
    """A pool that works where it is asked."""

    def __init__(self, workers: int):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, arguments):
        return function(*arguments)

    def imap_unordered(self, function, runs):
        return map(function, runs)


class TestReport:
    @pytest.mark.parametrize(
        ("span", "random", "found"),
        [
            (-0.2, 0.0, "**The spans help in this set-up, against both controls**"),
            (-0.2, -0.2, "**No gain from the spans is shown here"),  # any subspace would do
            (0.2, 0.3, "**No gain from the spans is shown here"),
            (0.2, 0.0, "is higher than that of plain gradients"),
            (-0.2, 0.0, "is lower than that of plain gradients"),
        ],
    )
    def test_the_verdict_follows_the_numbers(self, span, random, found):
        host, runs = records(span, random)
        assert found in report.verdict(host, runs)
        assert "a_parallel = 1 and a_perpendicular = 0" in report.verdict(host, runs)  # the pair made best
        page = report.to_markdown(host, runs)
        assert page.count("\n| span |") == page.count("\n| random |") == 2 * len(PAIRS)
        assert "reconstruction from the abstract" in page

    @pytest.mark.parametrize(("seeds", "p"), [(1, "1"), (2, "0.5"), (5, "0.0625")])
    def test_too_few_seeds_have_no_verdict(self, seeds, p):
        host, runs = records(-0.2, 0.0, seeds)
        found = report.to_markdown(host, runs)
        assert f"**Too few seeds for a verdict**: {seeds}, where the sign-flip test's p is at least {p};" in found
        assert "The spans help" not in found
        assert report.least_p(report.SEEDS_MIN) < report.SIGNIFICANT <= report.least_p(report.SEEDS_MIN - 1)

    def test_a_seed_that_was_cut_off_is_left_out(self):
        host, runs = records(-0.2, 0.0, seeds=7)
        assert "7 paired seeds (the least p that so many can give is 0.0156)" in report.to_markdown(host, runs)
        cut = runs[:-1]
        assert "6 paired seeds (the least p that so many can give is 0.0312)" in report.to_markdown(host, cut)
        none = [r for r in runs if r["phase"] == "tune"]
        with pytest.raises(ValueError, match="one complete seed of the comparison, got none"):
            report.to_markdown(host, none)

    def test_the_sign_flip_test(self):
        assert report.sign_flip_p([1.0] * 8) == 2 / 256
        assert report.sign_flip_p([1.0, -1.0]) == 1.0
        assert report.sign_flip_p([3.0, 2.0, -1.0]) == 0.5  # |sum| 4 or 6: 4 of the 8 signs

    def test_changes_are_paired_by_seed(self):
        found = [
            {
                "phase": "compare",
                "arm": arm,
                "pair": PLAIN,
                "rate": 1.0,
                "seed": seed,
                "held_out": 100 * (seed + 1) + more,
            }
            for arm, more in (("plain", 0.0), ("span", 2.0))
            for seed in ((0, 1, 2) if arm == "plain" else (2, 0, 1))
        ]
        change = report.paired(found, ("span", PLAIN), ("plain", PLAIN))
        assert change["mean"] == pytest.approx(1.0)  # 2 of a mean of 200
        assert change["spread"] == pytest.approx(0.0, abs=1e-12)
        assert change["p"] == 0.25

    def test_the_page_is_rendered_from_its_records(self):
        path = ROOT / "docs" / "span_scaling.jsonl"
        if not path.exists():
            pytest.skip("docs/span_scaling.jsonl has not been measured")
        host, *found = map(json.loads, path.read_text().splitlines())
        assert report.to_markdown(host, found).strip() == path.with_suffix(".md").read_text().strip()


def test_what_the_readme_says_of_it():
    root = Path(__file__).parent.parent
    page, readme = (" ".join((root / name).read_text().split()) for name in ("docs/span_scaling.md", "README.md"))
    assert "cannot be told apart from that of plain gradients" in page
    assert "cannot be told apart from that of random subspaces under the same factors" in page
    assert "in 8 paired seeds" in page
    assert (
        "Over eight seeds its loss cannot be told apart from that of plain gradients, nor from that of random subspaces"
        in readme
    )
