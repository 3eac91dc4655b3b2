"""Measurements of a run as JSON, CSV, plot and model card, and the comparison of two runs."""

import csv
import json
import math
import os
import platform
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import transformers

from .. import __version__
from ..integrations import GeometryReport
from .failures import InputError

Outcome = Literal["finished", "interrupted", "diverged", "failed"]


@dataclass(frozen=True)
class RunMetrics:
    """One run, finished or not. Losses are nats per token."""

    settings: dict
    environment: dict
    steps: list[dict]  # a dict a step: step, loss, learning_rate, grad_norm, step_seconds, geoscale/…
    eval_before: float  # held-out text
    eval_after: float | None  # None where the run did not come so far
    layers: list[dict] | None  # rows of geometry_report; None without FP8, or where the weights hold NaN
    outcome: Outcome = "finished"
    diverged_at: int | None = None  # first step whose loss, or whose weights afterwards, are not finite

    @classmethod
    def collect(
        cls, settings: dict, log: list[dict], before: float, after: float | None, report: GeometryReport | None
    ) -> "RunMetrics":
        """From the Trainer's log history, which a checkpoint keeps, and the losses on held-out text."""
        environment = {
            "hf_geoscale": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        steps = [entry for entry in log if "loss" in entry]
        diverged = next((entry["step"] for entry in steps if not math.isfinite(entry["loss"])), None)
        layers = None if report is None else report.rows
        outcome: Outcome = "finished" if diverged is None else "diverged"
        return cls(settings, environment, steps, before, after, layers, outcome, diverged)

    @classmethod
    def read(cls, folder: Path) -> "RunMetrics":
        """From the metrics.json of a run.

        Raises:
            InputError: the folder holds none, or one that this command did not write.
        """
        path = folder / "metrics.json"
        if not path.exists():
            raise InputError(
                f"{folder} holds no finished run (no metrics.json); run `hf-geoscale finetune` into it first"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        given = set(found) if isinstance(found, dict) else set()
        if not needed <= given <= known:
            raise InputError(
                f"{path} was not written by `hf-geoscale finetune`: missing {sorted(needed - given)}, "
                f"unknown {sorted(given - known)}"
            )
        metrics = cls(**found)
        try:
            _ = metrics.losses, metrics.seconds_per_step, metrics.settings["scaling"], metrics.settings["dtype"]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} was not written by `hf-geoscale finetune`: {error!r} in its steps") from error
        return metrics

    @property
    def in_fp8(self) -> bool:
        return self.settings["scaling"] == "geometry"

    @property
    def kernels(self) -> str | None:
        """Kernels that ran the attention, by the rows of the report; None without FP8."""
        names = dict.fromkeys(row["kernels"] for row in self.layers or () if row.get("kernels"))
        return ", ".join(names) or None

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.steps]

    @property
    def last_loss(self) -> float | None:
        return self.losses[-1] if self.steps else None

    @property
    def seconds_per_step(self) -> float:
        """Median wall clock of a step, refresh included; NaN without a step."""
        seconds = sorted(entry["step_seconds"] for entry in self.steps)
        return seconds[len(seconds) // 2] if seconds else math.nan

    @property
    def refresh_share(self) -> float:
        """Share of the training time that went into refreshing scales."""
        refresh = sum(entry.get("geoscale/refresh_seconds", 0.0) for entry in self.steps)
        return refresh / sum(entry["step_seconds"] for entry in self.steps) if self.steps else math.nan

    @property
    def overflows(self) -> int:
        return max((entry.get("geoscale/overflows", 0) for entry in self.steps), default=0)

    @property
    def utilisation(self) -> float:
        return max((entry.get("geoscale/utilisation", 0.0) for entry in self.steps), default=0.0)

    @property
    def label(self) -> str:
        """Name of the run in tables and plots."""
        return "FP8, scales from the weights" if self.in_fp8 else f"baseline, {self.settings['dtype']}"

    @property
    def ending(self) -> str | None:
        """How a run ended that did not finish; None for one that did."""
        done = len(self.steps)
        return {
            "finished": None,
            "interrupted": f"was interrupted after {done} of {self.settings['steps']} steps",
            "diverged": f"diverged in step {self.diverged_at}: from there on the loss or the weights hold NaN or Inf",
            "failed": f"was ended by an error after {done} of {self.settings['steps']} steps",
        }[self.outcome]


TREATMENT = {"scaling", "precision", "every_n_steps", "dtype"}
"""Settings in which a run may differ from its baseline; everything else must be equal for losses to be comparable."""


def read_baseline(folder: Path, settings: dict) -> RunMetrics:
    """Another run, to compare one of these settings with.

    Raises:
        InputError: there is none, it was not finished, or it saw other data or another order.
    """
    baseline = RunMetrics.read(folder)
    if baseline.outcome in ("interrupted", "failed"):
        raise InputError(f"the baseline {folder} {baseline.ending}; finish it with --resume first")
    check_comparable(settings, baseline.settings)
    return baseline


def check_comparable(settings: dict, baseline: dict) -> None:
    """Raise InputError, naming the settings, unless two runs saw the same data in the same order."""
    other = {
        k: (baseline[k], v) for k, v in settings.items() if k not in TREATMENT and k in baseline and baseline[k] != v
    }
    if other:
        raise InputError(f"the baseline had other settings, (baseline, this run): {other}")


def loss_gap(run: RunMetrics, baseline: RunMetrics) -> dict[str, float]:
    """Differences run − baseline in nats per token: largest and mean over steps, last quarter's mean, held-out text.

    Over the steps of both runs whose losses are finite. Entries without such a step, or without held-out losses, are left out.
    """
    gaps = [a - b for a, b in zip(run.losses, baseline.losses, strict=False) if math.isfinite(a - b)]
    found = {}
    if gaps:
        found["largest |gap| of a step"] = max(map(abs, gaps))
        found["mean gap"] = mean(gaps)
        found["mean gap, last quarter"] = mean(gaps[-max(1, len(gaps) // 4) :])
    if run.eval_after is not None and baseline.eval_after is not None:
        found["gap on held-out text"] = run.eval_after - baseline.eval_after
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one move: after a kill in the middle, the old text is still there."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def write_results(metrics: RunMetrics, baseline: RunMetrics | None, output: Path, with_plot: bool) -> None:
    """metrics.json, metrics.csv, README.md (the model card) and, if wanted, loss.png in `output`, numbers first."""
    from .card import write_card
    from .loss_plot import plot_losses

    write_whole(output / "metrics.json", json.dumps(asdict(metrics), indent=1) + "\n")
    columns = sorted(
        {key for entry in metrics.steps for key in entry}, key=lambda key: (key != "step", key != "loss", key)
    )
    with (output / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(metrics.steps)
    (output / "loss.png").unlink(missing_ok=True)
    write_card(metrics, baseline, output, with_plot)
    if with_plot:
        plot_losses(metrics, baseline, output / "loss.png")
