"""A fine-tuning run under way: its steps, and the results that remain however the run ends."""

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import Trainer, TrainerState

from ..errors import NonFiniteWeightsError
from ..integrations import GeometryReport, geometry_report
from .failures import RunError, failed_write
from .loading import load_model
from .results import Outcome, RunMetrics, write_results
from .run_folder import Settings, checkpoint_step, last_whole_checkpoint
from .stopping import StopOnSignal
from .summary import print_summary

GO_ON = "go on with the same command and --resume, which wins over --overwrite"


@dataclass(frozen=True)
class Run:
    """A run under way, with everything that its results need."""

    settings: Settings
    output: Path
    trainer: Trainer
    before: float
    baseline: RunMetrics | None
    with_plot: bool
    console: Console

    @property
    def steps(self) -> int:
        """Optimizer steps behind it."""
        return self.trainer.state.global_step

    def report(self) -> GeometryReport | None:
        """Rows of the layers; None without FP8, and after an error that left nothing to measure."""
        if self.settings.scaling != "geometry":
            return None
        try:
            return geometry_report(self.trainer.model)
        except NonFiniteWeightsError:
            return None

    def record(self, outcome: Outcome, after: float | None = None) -> RunMetrics | None:
        """Write and print the measurements so far; None before the first step."""
        metrics = RunMetrics.collect(
            asdict(self.settings), self.trainer.state.log_history, self.before, after, self.report()
        )
        if outcome == "diverged" and metrics.diverged_at is None:
            metrics = replace(metrics, outcome=outcome, diverged_at=self.steps + 1)
        elif metrics.outcome != "diverged":
            metrics = replace(metrics, outcome=outcome)
        if not metrics.steps and metrics.outcome != "diverged":
            return None
        write_results(metrics, self.baseline, self.output, self.with_plot)
        print_summary(metrics, self.baseline, self.output, self.console)
        return metrics

    def train(self, checkpoint: Path | None) -> None:
        """The steps that are left; of none, takes the checkpoint's weights and history."""
        if checkpoint is None or checkpoint_step(checkpoint) < self.settings.steps:
            self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        self.trainer.model.load_state_dict(load_model(str(checkpoint)).state_dict())
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def save_model(self) -> None:
        """Into `model`, which is there when it is whole. Raises RunError where it cannot be written."""
        unfinished, model = self.output / "model.unfinished", self.output / "model"
        try:
            self.trainer.save_model(str(unfinished))
            shutil.rmtree(model, ignore_errors=True)
            os.replace(unfinished, model)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            reason = written_badly(error)
            if reason is None:
                raise
            last, _ = last_whole_checkpoint(self.output, self.settings.steps)
            held = last is not None and checkpoint_step(last) >= self.settings.steps
            hope = f"Free space, then {GO_ON}: {last} holds it." if held else "No checkpoint holds it (--save-steps N)."
            raise RunError(
                f"{model} could not be written ({reason}). Metrics and card are in {self.output}. {hope}"
            ) from error
        self.console.print(f"model: {model}", soft_wrap=True)

    def interrupted(self) -> str:
        """Message after Ctrl-C."""
        last, _ = last_whole_checkpoint(self.output, self.settings.steps)
        what = "starts anew: there is no checkpoint" if last is None else f"goes on from {last.name}"
        return f"Interrupted after {self.steps} of {self.settings.steps} steps. The same command with --resume {what}."


def written_badly(error: BaseException) -> str | None:
    """Why a file could not be written; None for an error that is not about that."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return failed_write(error)


def ended_by(error: Exception, run: Run) -> Exception:
    """Write the results of a run that an error ended; returns the error to raise instead."""
    try:
        kept = run.record("failed") is not None
    except Exception as second:  # a full disk, or a device that is gone: the first error is the one to tell
        run.console.print(f"The results so far could not be written: {second}", markup=False, soft_wrap=True)
        kept = False
    where = f"Metrics of {run.steps} steps are in {run.output}." if kept else "No step was recorded."
    reason = written_badly(error)
    if reason is None:
        run.console.print(f"The run ended after step {run.steps} of {run.settings.steps}. {where}", soft_wrap=True)
        return error
    return RunError(f"A file could not be written after step {run.steps} ({reason}). {where} Free space, then {GO_ON}.")


def carry_out(run: Run, checkpoint: Path | None, stop: StopOnSignal, save_model: bool) -> int:
    """Train, evaluate, write down; returns the command's exit status.

    Raises:
        RunError: a file could not be written.
    """
    outcome: Outcome = "finished"
    after, cause = None, ""
    with stop:
        try:
            run.train(checkpoint)
            if stop.signal is None:
                after = run.trainer.evaluate()["eval_loss"]
            else:
                outcome = "interrupted"
        except KeyboardInterrupt:
            outcome = "interrupted"
        except NonFiniteWeightsError as error:
            outcome, cause = "diverged", f" ({str(error).partition(', so ')[0]})"
        except Exception as error:
            raise ended_by(error, run) from error
        metrics = run.record(outcome, after)
        if outcome == "interrupted":
            run.console.print(run.interrupted(), style="bold", soft_wrap=True)
            return stop.exit_code
        if metrics is not None and metrics.outcome == "diverged":
            raise RunError(
                f"{run.settings.model} {metrics.ending}{cause}. Metrics and card are in {run.output}; no model was written"
            )
        if save_model:
            run.save_model()
    return 0
