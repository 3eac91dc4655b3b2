"""`geometry_report`: what the weights promise and what the calls saw, a row a layer."""

from dataclasses import dataclass
from typing import Any

from ..geometry import alpha_min, measure_interaction
from .layer import GeoScaleLayer, PatchedLayer
from .patching import patched_layers

DEFAULT_LENGTH = 4096
"""Tokens assumed by the rank-aware bound where neither the config nor the model states a maximum (a guess)."""


_BOUNDS = ("sigma_lower", "sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound", "worst_case_logit")


@dataclass(frozen=True)
class GeometryReport:
    """Rows of `geometry_report`.

    Each row: `layer`, `family`; lists over heads `sigma_lower`, `sigma_upper` (interaction, without RoPE), `q_bound`,
    `k_bound`, `v_bound`, `logit_bound` (certificates, RoPE-safe), `worst_case_logit` (B₁ of arXiv 2602.18851); `alpha_min`
    (rank-aware), `alpha_observed` (largest |logit| / B₁; None until observed), `logit_amax` (list or None), `utilisation`
    (largest operand entry / certificate; None before a call), `overflows`, `calls`, `fallback_calls`, `fallback_reasons`.
    """

    rows: list[dict]

    def to_markdown(self) -> str:
        """A table of the worst head of every layer."""
        columns: tuple[str, ...] = (
            "layer",
            "σ lower",
            "σ upper",
            "|q| ≤",
            "|k| ≤",
            "|v| ≤",
            "|logit| ≤",
            "α min",
            "α observed",
        )
        columns += ("utilisation", "overflows", "FP8 calls", "SDPA calls")
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(self.cells(row)) + " |")
        return "\n".join(lines) + "\n"

    @staticmethod
    def cells(row: dict) -> list[str]:
        """The table's cells of one row, as text."""
        worst = [
            _worst(row[name]) for name in ("sigma_lower", "sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound")
        ]
        shares = [
            "–" if row[name] is None else f"{row[name]:.3f}" for name in ("alpha_min", "alpha_observed", "utilisation")
        ]
        counts = [str(row[name]) for name in ("overflows", "calls", "fallback_calls")]
        return [str(row["layer"]), *worst, *shares, *counts]


def _worst(values: list[float]) -> str:
    return f"{max(values):.4g}" if values else "–"


def _row(index: int, layer: PatchedLayer, model: Any, layers: int) -> dict:
    row: dict = {"layer": index, "family": model.config.model_type}
    row |= {name: [] for name in _BOUNDS}
    row |= dict.fromkeys(("alpha_min", "alpha_observed", "logit_amax", "utilisation"))
    row |= {"overflows": 0, "calls": layer.calls, "fallback_calls": layer.delegated.total()}
    row["fallback_reasons"] = dict(layer.delegated)
    if isinstance(layer, GeoScaleLayer):
        row |= _measured(layer, model, layers)
    return row


def _measured(layer: GeoScaleLayer, model: Any, layers: int) -> dict:
    """The part of a row that only a layer running in FP8 has."""
    query, key, _ = layer.site.projections()
    row = {name: getattr(layer.geometry, name).tolist() for name in _BOUNDS if hasattr(layer.geometry, name)}
    sigma, worst_case = measure_interaction(query, key, layer.site.softmax_scale)
    row["sigma_upper"], row["worst_case_logit"] = sigma.tolist(), worst_case.tolist()
    length = layer.config.max_length or getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    heads, dim, width = query.weight.shape
    row["alpha_min"], _ = alpha_min(width, dim, length, heads, layers, layer.config.failure_prob)
    if layer.statistics.logit_amax is not None:
        amax = layer.statistics.logit_amax.double().to(worst_case.device)
        row["logit_amax"] = amax.tolist()
        row["alpha_observed"] = float((amax / worst_case).amax())
    layer.drain_utilisation()
    row["utilisation"], row["overflows"] = layer.peak_utilisation, layer.statistics.overflows
    return row


def geometry_report(model: Any) -> GeometryReport:
    """Certificates, rank-aware bound and counters of every patched layer.

    Raises:
        ValueError: the model is not patched.
    """
    layers = patched_layers(model)
    if not layers:
        raise ValueError("geometry_report needs a patched model: call patch_model(model) first")
    return GeometryReport([_row(index, layer, model, len(layers)) for index, layer in enumerate(layers)])
