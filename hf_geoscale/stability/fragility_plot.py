"""Layer × step heat map of a fragility quantity."""

from collections.abc import Sequence
from pathlib import Path


def heat_map(
    steps: Sequence[int],
    values: Sequence[Sequence[float]],  # a list a step, a value a layer
    path: str | Path,
    label: str = "risk",
) -> None:
    """Write a figure of log₁₀ of positive values, layers upwards, steps to the right; needs matplotlib (extra `plot`).

    Raises:
        ValueError: nothing was observed. ImportError: matplotlib is missing.
    """
    if not values:
        raise ValueError("there is nothing to plot: no fragility was observed yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    columns = [[value if value > 0 else float("nan") for value in step] for step in values]
    image = axes.imshow(
        [list(row) for row in zip(*columns, strict=True)],
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        norm=LogNorm(),
        cmap="magma",
    )
    shown = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("layer")
    figure.colorbar(image, label=label)
    figure.savefig(path, dpi=140)
