"""Ctrl-C and SIGTERM: what is kept, what is said, and that --resume goes on to the same losses."""

import csv
import os
import signal
import subprocess
import sys

import pytest
from transformers import Trainer

from hf_geoscale.cli.results import RunMetrics

from .conftest import refused, run

STEPS = 8
SHORT = ("--length", 16, "--steps", STEPS, "--eval-sequences", 1)


@pytest.fixture(scope="module")
def command(tiny_folder, text_file):
    return ("finetune", tiny_folder, "--text", text_file, *SHORT)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The same run, not interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert run(*command, "--output", output).exit_code == 0
    return output


@pytest.fixture
def signals(monkeypatch):
    """Send signals to this process in the middle of given training steps; counts the steps."""
    steps = []

    def plan(at: dict[int, list[int]]):
        original = Trainer.training_step

        def training_step(*args, **kwargs):
            steps.append(1)
            loss = original(*args, **kwargs)
            for number in at.get(len(steps), ()):
                os.kill(os.getpid(), number)
            return loss

        monkeypatch.setattr(Trainer, "training_step", training_step)
        return steps

    return plan


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_with_default_options_nothing_is_lost(command, whole, tmp_path, signals, capfd, number, code):
    output, before = tmp_path / "out", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    signals({3: [number]})
    result = run(*command, "--output", output)
    assert result.exit_code == code, result.output
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert "Stopping at the end of this step" in capfd.readouterr().err
    assert f"Interrupted after 3 of {STEPS} steps" in result.stdout
    assert "--resume goes on from checkpoint-3" in result.stdout
    metrics = RunMetrics.read(output)
    assert (metrics.outcome, metrics.eval_after) == ("interrupted", None)
    assert metrics.losses == RunMetrics.read(whole).losses[:3]
    assert len(list(csv.DictReader((output / "metrics.csv").open()))) == 3
    assert f"**This run was interrupted after 3 of {STEPS} steps.**" in (output / "README.md").read_text()
    assert not (output / "model").exists()

    resumed = run(*command, "--output", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming from checkpoint-3" in resumed.stdout
    ours, theirs = RunMetrics.read(output), RunMetrics.read(whole)
    assert ours.losses == theirs.losses
    assert (ours.eval_before, ours.eval_after, ours.outcome) == (theirs.eval_before, theirs.eval_after, "finished")
    assert (output / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert "This run was" not in (output / "README.md").read_text()


def test_in_the_last_step_resume_evaluates_and_writes(command, whole, tmp_path, signals):
    steps = signals({STEPS: [signal.SIGINT]})
    assert run(*command, "--output", tmp_path).exit_code == 130
    assert run(*command, "--output", tmp_path, "--resume").exit_code == 0
    assert len(steps) == STEPS
    assert RunMetrics.read(tmp_path).eval_after == RunMetrics.read(whole).eval_after
    assert (tmp_path / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_second_one_stops_at_once(command, whole, tmp_path, signals):
    """No checkpoint then, but the metrics of the steps that were done."""
    signals({3: [signal.SIGINT, signal.SIGINT]})
    result = run(*command, "--output", tmp_path)
    assert result.exit_code == 130, result.output
    assert f"Interrupted after 2 of {STEPS} steps. The same command with --resume starts anew" in result.stdout
    assert RunMetrics.read(tmp_path).losses == RunMetrics.read(whole).losses[:2]
    assert not list(tmp_path.glob("checkpoints/checkpoint-*"))
    assert run(*command, "--output", tmp_path, "--resume").exit_code == 0
    assert RunMetrics.read(tmp_path).losses == RunMetrics.read(whole).losses


def test_a_second_one_leaves_the_checkpoints_of_save_steps(command, tmp_path, signals):
    signals({5: [signal.SIGINT, signal.SIGINT]})
    result = run(*command, "--output", tmp_path, "--save-steps", 2)
    assert "--resume goes on from checkpoint-4" in result.stdout


def test_before_the_first_step_there_is_nothing_to_write(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    result = run(*command, "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    monkeypatch.undo()
    assert run(*command, "--output", tmp_path / "out", "--resume").exit_code == 0


def test_one_while_results_are_written_lets_them_be_written(command, whole, tmp_path, monkeypatch, capfd):
    original = Trainer.evaluate

    def evaluate(self, *args, **kwargs):
        if self.state.global_step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert run(*command, "--output", tmp_path).exit_code == 0
    assert "its results are being written" in capfd.readouterr().err
    assert RunMetrics.read(tmp_path).eval_after == RunMetrics.read(whole).eval_after
    assert (tmp_path / "model").is_dir()


def test_an_interrupted_run_is_no_baseline(command, tmp_path, signals):
    signals({3: [signal.SIGINT]})
    run(*command, "--output", tmp_path / "out")
    said = refused(*command, "--output", tmp_path / "other", "--baseline", tmp_path / "out")
    assert f"was interrupted after 3 of {STEPS} steps; finish it with --resume first" in said


def test_transients_write_the_table_of_what_is_over(tiny_folder, text_file, tmp_path, monkeypatch):
    from hf_geoscale.cli import transients

    original, played = transients.play, []

    def play(*args):
        played.append(1)
        if len(played) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        yield from original(*args)

    monkeypatch.setattr(transients, "play", play)
    options = ("--text", text_file, "--output", tmp_path, "--length", 16, "--scenario", "fresh")
    result = run("transients", tiny_folder, *options)
    assert result.exit_code == 130
    assert "2 of 7 runs are over" in result.stdout
    table = (tmp_path / "transients.md").read_text()
    assert "| unquantised |" in table
    assert "| geometry |" in table
    assert "| rank-aware |" not in table


IN_A_THREAD = """
import os, signal, sys, threading
from transformers import Trainer
from hf_geoscale.cli import app

thread = threading.Thread(target=lambda: app(standalone_mode=False))
thread.start(); thread.join()
print("ended")
"""


def test_outside_the_main_thread_it_trains(command, tmp_path):
    """Python allows no handlers there."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD, *map(str, command), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1] == "ended"
    assert (tmp_path / "out" / "model").is_dir(), done.stderr
