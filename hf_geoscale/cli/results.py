"""What a run measured: JSON, CSV, plot, model card, and the comparison of two runs."""

import csv
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
import transformers
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..integrations import GeometryReport


@dataclass(frozen=True)
class RunMetrics:
    """One finished run. Losses are nats per token."""

    settings: dict
    environment: dict
    steps: list[dict]  # a dict a step: step, loss, learning_rate, grad_norm, step_seconds, geoscale/…
    eval_before: float  # held-out text
    eval_after: float
    layers: list[dict] | None  # rows of geometry_report; None without FP8

    @classmethod
    def collect(
        cls, settings: dict, log: list[dict], before: float, after: float, report: GeometryReport | None
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
        return cls(settings, environment, steps, before, after, None if report is None else report.rows)

    @classmethod
    def read(cls, folder: Path) -> "RunMetrics":
        """From the metrics.json of a finished run.

        Raises:
            ValueError: the folder holds no finished run.
        """
        path = folder / "metrics.json"
        if not path.exists():
            raise ValueError(
                f"{folder} holds no finished run (no metrics.json); run `hf-geoscale finetune` into it first"
            )
        return cls(**json.loads(path.read_text()))

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.steps]

    @property
    def seconds_per_step(self) -> float:
        """Median wall clock of a step, refresh included."""
        seconds = sorted(entry["step_seconds"] for entry in self.steps)
        return seconds[len(seconds) // 2]

    @property
    def refresh_share(self) -> float:
        """Share of the training time that went into refreshing scales."""
        refresh = sum(entry.get("geoscale/refresh_seconds", 0.0) for entry in self.steps)
        return refresh / sum(entry["step_seconds"] for entry in self.steps)

    @property
    def overflows(self) -> int:
        return max((entry.get("geoscale/overflows", 0) for entry in self.steps), default=0)

    @property
    def utilisation(self) -> float:
        return max((entry.get("geoscale/utilisation", 0.0) for entry in self.steps), default=0.0)


TREATMENT = {"scaling", "precision", "every_n_steps", "dtype"}
"""Settings in which a run may differ from its baseline; everything else must be equal for losses to be comparable."""


def check_comparable(settings: dict, baseline: dict) -> None:
    """Raise ValueError, naming the settings, unless two runs saw the same data in the same order."""
    other = {k: (baseline.get(k), v) for k, v in settings.items() if k not in TREATMENT and baseline.get(k) != v}
    if other:
        raise ValueError(f"the baseline had other settings, (baseline, this run): {other}")


def loss_gap(run: RunMetrics, baseline: RunMetrics) -> dict[str, float]:
    """Differences run − baseline in nats per token: largest and mean over steps, last quarter's mean, held-out text."""
    gaps = [a - b for a, b in zip(run.losses, baseline.losses, strict=True)]
    return {
        "largest |gap| of a step": max(map(abs, gaps)),
        "mean gap": mean(gaps),
        "mean gap, last quarter": mean(gaps[-max(1, len(gaps) // 4) :]),
        "gap on held-out text": run.eval_after - baseline.eval_after,
    }


def _label(run: RunMetrics) -> str:
    """What ran the attention, for a reader: "FP8, scales from the weights" or the baseline's dtype."""
    return (
        "FP8, scales from the weights"
        if run.settings["scaling"] == "geometry"
        else f"baseline, {run.settings['dtype']}"
    )


def _plot(metrics: RunMetrics, baseline: RunMetrics | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    x = [entry["step"] for entry in metrics.steps]
    if baseline is not None:
        left.plot(
            x,
            baseline.losses,
            color="0.5",
            linewidth=2.5,
            label=_label(baseline),
        )
        right.axhline(0, color="0.5", linewidth=1)
        right.plot(x, [a - b for a, b in zip(metrics.losses, baseline.losses, strict=True)], color="C0")
        right.set(title="Loss difference", xlabel="step", ylabel="nats per token")
    else:
        right.plot(x, [entry.get("geoscale/utilisation", 0.0) for entry in metrics.steps], color="C0")
        right.set(title="Worst certificate utilisation", xlabel="step", ylim=(0, 1))
    left.plot(x, metrics.losses, color="C0", linewidth=1.2, label=_label(metrics))
    left.set(title="Training loss", xlabel="step", ylabel="nats per token")
    left.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _card(metrics: RunMetrics, baseline: RunMetrics | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    model = metrics.settings["model"]
    data = ModelCardData(
        base_model=None if Path(model).exists() else model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-geoscale", "fp8"] if metrics.settings["scaling"] == "geometry" else [],
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        model=Path(model).name if Path(model).exists() else model,
        run=metrics,
        baseline=baseline,
        gap=None if baseline is None else loss_gap(metrics, baseline),
    ).content


def write_results(metrics: RunMetrics, baseline: RunMetrics | None, output: Path) -> None:
    """metrics.json, metrics.csv, loss.png and README.md (the model card) in `output`."""
    (output / "metrics.json").write_text(json.dumps(asdict(metrics), indent=1) + "\n")
    columns = sorted(
        {key for entry in metrics.steps for key in entry}, key=lambda key: (key != "step", key != "loss", key)
    )
    with (output / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(metrics.steps)
    _plot(metrics, baseline, output / "loss.png")
    (output / "README.md").write_text(_card(metrics, baseline))


def print_summary(metrics: RunMetrics, baseline: RunMetrics | None, output: Path, console: Console) -> None:
    """Losses side by side, what FP8 cost, and where everything lies."""
    runs = [run for run in (baseline, metrics) if run is not None]
    table = Table(title="Training loss, nats per token")
    table.add_column("step", justify="right")
    for run in runs:
        table.add_column(_label(run), justify="right")
    if baseline is not None:
        table.add_column("gap", justify="right")
    stride = max(1, len(metrics.steps) // 10)
    for index in sorted({*range(0, len(metrics.steps), stride), len(metrics.steps) - 1}):
        losses = [run.losses[index] for run in runs if index < len(run.losses)]
        gap = [f"{losses[1] - losses[0]:+.4f}"] if baseline is not None and len(losses) == 2 else []
        table.add_row(str(metrics.steps[index]["step"]), *(f"{loss:.4f}" for loss in losses), *gap)
    console.print(table)
    for run in runs:
        console.print(
            f"{_label(run)}: held-out loss {run.eval_before:.4f} → {run.eval_after:.4f}, {run.seconds_per_step:.2f} s a step"
        )
    if metrics.layers is not None:
        calls = sum(row["calls"] for row in metrics.layers)
        console.print(
            f"FP8: {metrics.overflows} overflows in {calls} attention calls, worst certificate utilisation "
            f"{metrics.utilisation:.1%}, refreshing scales took {metrics.refresh_share:.1%} of the training time"
        )
    if baseline is not None:
        for name, value in loss_gap(metrics, baseline).items():
            console.print(f"{name}: {value:+.4f}")
    for what, name in (
        ("plot", "loss.png"),
        ("card", "README.md"),
        ("metrics", "metrics.json, metrics.csv"),
        ("model", "model"),
    ):
        if (output / name.split(",")[0]).exists():
            console.print(f"{what}: {output}/{name}", soft_wrap=True)
