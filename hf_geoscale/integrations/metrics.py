"""What the layers of a model add to the logs of training and of evaluation."""

from collections.abc import Sequence
from typing import Any

from .layer import GeoScaleLayer
from .observations import certificate_drift


def _worst_utilisation(layers: Sequence[GeoScaleLayer], training: bool) -> tuple[float, int] | None:
    """Largest utilisation since it was asked for last, and its layer; None without a forward."""
    drained = [(layer.drain_utilisation(training), layer.site.layer) for layer in layers]
    used = [(share, layer) for share, layer in drained if share is not None]
    return max(used) if used else None


def training_metrics(layers: Sequence[GeoScaleLayer], overflows: int) -> dict[str, Any]:
    """What a log of training gains, by name; see `GeoScaleCallback`. Starts the intervals of both modes over.

    Where modules are trained in evaluation mode, as frozen ones may be, no call was in training mode and all of them count.

    Args:
        overflows: of all calls so far.
    """
    drift, place = certificate_drift(layers)
    worst, evaluation = _worst_utilisation(layers, training=True), _worst_utilisation(layers, training=False)
    if any(layer.utilisation[True].seen for layer in layers):
        overflows -= sum(layer.evaluation_overflows for layer in layers)
    else:
        worst = evaluation
    metrics: dict[str, Any] = {"geoscale/overflows": overflows, "geoscale/sigma_drift": drift}
    if drift:
        metrics["geoscale/sigma_drift_layer"] = layers[place].site.layer
    if worst is not None:
        metrics["geoscale/utilisation"], metrics["geoscale/utilisation_layer"] = worst
    if fallback := sum(layer.delegated.total() for layer in layers):
        metrics["geoscale/fallback_calls"] = fallback
    return metrics


def evaluation_metrics(layers: Sequence[GeoScaleLayer], prefix: str) -> dict[str, Any]:
    """What a log of an evaluation gains, by name. Starts the interval of evaluation mode over.

    Args:
        prefix: of the evaluation's own names, such as "eval".
    """
    metrics: dict[str, Any] = {f"{prefix}_geoscale/overflows": sum(layer.evaluation_overflows for layer in layers)}
    if (worst := _worst_utilisation(layers, training=False)) is not None:
        metrics[f"{prefix}_geoscale/utilisation"] = worst[0]
    return metrics


def cause_of_overflows(layers: Sequence[GeoScaleLayer]) -> str:
    """What overflows of these layers say about their configuration; waits for the device."""
    config = layers[0].config
    if config.scaling != "geometry" or config.bound != "certified":
        return f"scaling={config.scaling!r}, bound={config.bound!r} excludes none"
    counts = [layer.statistics.overflows_by_operand for layer in layers]
    if any(count for by_operand in counts for operand, count in by_operand.items() if operand != "logit gradient"):
        return "a certificate was exceeded, please report it"
    # no finite dO overflows dS8: docs/numerics.md
    return "only of gradients that came in as Inf or NaN, in steps that fp16's GradScaler skips"
