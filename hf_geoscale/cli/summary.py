"""A run's losses and outputs, for the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import RunMetrics, loss_gap

ROWS = 10
"""Steps shown, beside the last."""


def _losses(metrics: RunMetrics, baseline: RunMetrics | None) -> Table:
    runs = [run for run in (baseline, metrics) if run is not None]
    table = Table(title="Training loss, nats per token")
    table.add_column("step", justify="right")
    for run in runs:
        table.add_column(run.label, justify="right")
    if baseline is not None:
        table.add_column("gap", justify="right")
    stride = max(1, len(metrics.steps) // ROWS)
    for index in sorted({*range(0, len(metrics.steps), stride), len(metrics.steps) - 1}):
        losses = [run.losses[index] for run in runs if index < len(run.losses)]
        gap = [f"{losses[1] - losses[0]:+.4f}"] if baseline is not None and len(losses) == 2 else []
        table.add_row(str(metrics.steps[index]["step"]), *(f"{loss:.4f}" for loss in losses), *gap)
    return table


def print_summary(metrics: RunMetrics, baseline: RunMetrics | None, output: Path, console: Console) -> None:
    """Losses side by side, the cost of FP8, and the places of all files but the model."""
    if metrics.steps:
        console.print(_losses(metrics, baseline))
    for run in [run for run in (baseline, metrics) if run is not None]:
        after = "not evaluated" if run.eval_after is None else f"{run.eval_after:.4f}"
        console.print(
            f"{run.label}: held-out loss {run.eval_before:.4f} → {after}, {run.seconds_per_step:.2f} s a step"
        )
    if metrics.layers is not None and metrics.steps:
        calls = sum(row["calls"] for row in metrics.layers)
        kernels = "" if metrics.kernels is None else f", by {metrics.kernels}"
        console.print(
            f"FP8: {metrics.overflows} overflows in {calls} attention calls{kernels}, worst certificate utilisation "
            f"{metrics.utilisation:.1%}, refreshing scales took {metrics.refresh_share:.1%} of the training time"
        )
    if baseline is not None:
        for name, value in loss_gap(metrics, baseline).items():
            console.print(f"{name}: {value:+.4f}")
    for kind, name in (("metrics", "metrics.json, metrics.csv"), ("card", "README.md"), ("plot", "loss.png")):
        if (output / name.split(",")[0]).exists():
            console.print(f"{kind}: {output}/{name}", soft_wrap=True)
