"""Loss of a run, its difference to a baseline, and the utilisation of the certificates."""

import math
from pathlib import Path

from rich.console import Console

from .results import RunMetrics


def plot_possible(console: Console) -> bool:
    """Whether matplotlib is there; says so if it is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        console.print(f"No plot will be drawn, matplotlib is missing ({error}): pip install matplotlib", soft_wrap=True)
        return False
    return True


def plot_losses(metrics: RunMetrics, baseline: RunMetrics | None, path: Path) -> None:
    """A panel of losses; with a baseline one of differences; with FP8 one of utilisation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    panels = ["loss", *(["gap"] if baseline is not None else []), *(["utilisation"] if metrics.in_fp8 else [])]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    by_name = dict(zip(panels, axes[0], strict=True))
    steps = [entry["step"] for entry in metrics.steps]
    marker = "." if len(steps) < 3 else None  # a line of one point is invisible
    if baseline is not None:
        other = [entry["step"] for entry in baseline.steps]
        by_name["loss"].plot(other, baseline.losses, color="0.5", linewidth=2.5, marker=marker, label=baseline.label)
        gaps = [a - b for a, b in zip(metrics.losses, baseline.losses, strict=False)]
        by_name["gap"].axhline(0, color="0.5", linewidth=1)
        by_name["gap"].plot(steps[: len(gaps)], gaps, color="C0", marker=marker)
        by_name["gap"].set(title="Loss difference", ylabel="nats per token")
    by_name["loss"].plot(steps, metrics.losses, color="C0", linewidth=1.2, marker=marker, label=metrics.label)
    by_name["loss"].set(title="Training loss", ylabel="nats per token")
    by_name["loss"].legend()
    if metrics.in_fp8:
        used = [entry.get("geoscale/utilisation", math.nan) for entry in metrics.steps]
        by_name["utilisation"].plot(steps, used, color="C0", marker=marker)
        by_name["utilisation"].set(
            title="Worst certificate utilisation", ylim=(0, 1), ylabel="largest entry / certificate"
        )
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metrics.diverged_at is not None:
            axis.axvline(metrics.diverged_at, color="C3", linewidth=1, linestyle=":")
    ending = "" if metrics.ending is None else f" ({metrics.ending.partition(':')[0]})"
    figure.suptitle(f"{Path(metrics.settings['model']).name}{ending}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
