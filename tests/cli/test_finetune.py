"""The main job on a tiny model: outputs, comparison, refusals, kill and resume."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, Trainer

from hf_geoscale.cli.results import RunMetrics, loss_gap

from .conftest import run

QUICK = ("--steps", 6, "--length", 32, "--batch-size", 2)


@pytest.fixture(scope="module")
def runs(tiny_folder, text_file, tmp_path_factory):
    """A baseline and an FP8 run compared with it."""
    folder = tmp_path_factory.mktemp("runs")
    for scaling, extra in (("none", ()), ("geometry", ("--baseline", folder / "none"))):
        arguments = ("finetune", tiny_folder, "--text", text_file, "--scaling", scaling, "--output", folder / scaling)
        result = run(*arguments, *QUICK, *extra)
        assert result.exit_code == 0, result.output
    return folder, result.output


def test_everything_is_written(runs):
    folder, _ = runs
    for scaling in ("none", "geometry"):
        out = folder / scaling
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader((out / "metrics.csv").open()))
        assert [int(row["step"]) for row in rows] == list(range(1, 7))
        metrics = RunMetrics.read(out)
        assert [float(row["loss"]) for row in rows] == metrics.losses
        assert metrics.settings["scaling"] == scaling
        assert metrics.eval_after < metrics.eval_before
        AutoModelForCausalLM.from_pretrained(out / "model")


def test_fp8_run_logs_its_numerics(runs):
    metrics = RunMetrics.read(runs[0] / "geometry")
    assert metrics.overflows == 0
    assert 0 < metrics.utilisation < 1
    assert 0 < metrics.refresh_share < 1
    assert len(metrics.layers) == 2
    assert RunMetrics.read(runs[0] / "none").layers is None


def test_comparison(runs):
    folder, output = runs
    ours, baseline = (RunMetrics.read(folder / name) for name in ("geometry", "none"))
    gaps = loss_gap(ours, baseline)
    assert 0 < gaps["largest |gap| of a step"] < 0.05
    assert "gap on held-out text" in output
    assert "0 overflows" in output
    card = (folder / "geometry" / "README.md").read_text()
    assert f"{ours.losses[-1]:.4f}" in card
    assert f"{baseline.losses[-1]:.4f}" in card
    assert "hf-geoscale" in card
    assert "hf-geoscale" in (folder / "none" / "README.md").read_text()


def test_same_seed_same_losses(runs, tiny_folder, text_file, tmp_path):
    arguments = ("finetune", tiny_folder, "--text", text_file, *QUICK, "--no-save-model")
    for seed, same in ((0, True), (1, False)):
        result = run(*arguments, "--seed", seed, "--output", tmp_path / str(seed))
        assert result.exit_code == 0, result.output
        assert (RunMetrics.read(tmp_path / str(seed)).losses == RunMetrics.read(runs[0] / "geometry").losses) == same
        assert not (tmp_path / str(seed) / "model").exists()


def test_every_n_steps_and_high_precision(tiny_folder, text_file, tmp_path):
    options = ("--every-n-steps", 3, "--precision", "high", "--dtype", "bfloat16")
    result = run("finetune", tiny_folder, "--text", text_file, *QUICK, *options, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert RunMetrics.read(tmp_path).overflows == 0


class TestRefusals:
    def test_an_earlier_run_is_not_overwritten(self, runs, tiny_folder, text_file):
        before = (runs[0] / "none" / "metrics.json").read_bytes()
        result = run("finetune", tiny_folder, "--text", text_file, "--output", runs[0] / "none", *QUICK)
        assert result.exit_code == 1
        assert "--resume" in result.output
        assert "--overwrite" in result.output
        assert (runs[0] / "none" / "metrics.json").read_bytes() == before

    def test_a_folder_of_something_else_is_left_alone(self, tiny_folder, text_file, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "precious").write_text("mine")
        for extra in ((), ("--overwrite",), ("--resume",)):
            result = run("finetune", tiny_folder, "--text", text_file, "--output", tmp_path, *QUICK, *extra)
            assert result.exit_code == 1
            assert "not empty" in result.output
        assert [p.name for p in tmp_path.rglob("*")] == ["model", "precious"]

    def test_overwrite_replaces_a_run(self, tiny_folder, text_file, tmp_path):
        for seed in (0, 1):
            arguments = ("--text", text_file, "--output", tmp_path, "--seed", seed, "--overwrite", "--save-steps", 3)
            result = run("finetune", tiny_folder, *arguments, *QUICK)
            assert result.exit_code == 0, result.output
        assert RunMetrics.read(tmp_path).settings["seed"] == 1

    def test_a_baseline_of_other_data(self, runs, tiny_folder, text_file, tmp_path):
        arguments = (
            "--text",
            text_file,
            "--output",
            tmp_path / "out",
            "--baseline",
            runs[0] / "none",
            *QUICK,
            "--seed",
            3,
        )
        result = run("finetune", tiny_folder, *arguments)
        assert result.exit_code == 1
        assert "'seed': (0, 3)" in result.output
        assert not (tmp_path / "out").exists()

    def test_resuming_with_other_settings(self, runs, tiny_folder, text_file):
        out = runs[0] / "geometry"
        result = run("finetune", tiny_folder, "--text", text_file, "--output", out, *QUICK, "--seed", 5, "--resume")
        assert result.exit_code == 1
        assert "'seed': (0, 5)" in result.output

    def test_short_text(self, tiny_folder, tmp_path):
        (tmp_path / "short.txt").write_text("A few words.")
        result = run("finetune", tiny_folder, "--text", tmp_path / "short.txt", "--output", tmp_path / "out", *QUICK)
        assert result.exit_code == 1
        assert "sequences of 32 need" in result.output

    def test_text_and_dataset(self, tiny_folder, text_file, tmp_path):
        result = run("finetune", tiny_folder, "--text", text_file, "--dataset", "x", "--output", tmp_path / "out")
        assert result.exit_code == 1
        assert "not both" in result.output

    def test_baseline_that_does_not_exist(self, tiny_folder, text_file, tmp_path):
        result = run("finetune", tiny_folder, "--output", tmp_path / "out", "--baseline", tmp_path / "none")
        assert result.exit_code == 1
        assert "no finished run" in result.output
        assert not (tmp_path / "out").exists()


KILLED_IN_STEP_8 = """
import os, signal
from transformers import Trainer
from hf_geoscale.cli import app

original, calls = Trainer.training_step, []

def training_step(*args, **kwargs):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

Trainer.training_step = training_step
app()
"""


def test_killed_and_resumed_continues_with_the_same_losses(tiny_folder, text_file, tmp_path, monkeypatch):
    common = ["finetune", tiny_folder, "--text", text_file, "--length", 32, "--steps", 12, "--save-steps", 5]
    whole = run(*common, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_IN_STEP_8, *map(str, common), "--output", str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["checkpoint-5"]
    assert not (killed / "metrics.json").exists()
    steps, original = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs))
    resumed = run(*common, "--output", killed, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(steps) == 12 - 5
    ours, theirs = RunMetrics.read(killed), RunMetrics.read(tmp_path / "whole")
    assert ours.losses == theirs.losses
    assert len(ours.losses) == 12
    assert (ours.eval_before, ours.eval_after) == (theirs.eval_before, theirs.eval_after)
    assert json.loads((killed / "settings.json").read_text())["steps"] == 12
