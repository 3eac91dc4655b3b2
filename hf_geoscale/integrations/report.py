"""`geometry_report`: what the weights promise and what the calls saw, a row a layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..geometry import measure_interaction
from .layer import GeoScaleLayer, PatchedLayer, model_alpha_min
from .patching import patched_layers

_CERTIFICATES = ("sigma_lower", "q_bound", "k_bound", "v_bound", "logit_bound")
_BOUNDS = (*_CERTIFICATES, "sigma_upper", "worst_case_logit")

_OBSERVED = ("q_amax", "k_amax", "v_amax", "logit_amax")


@dataclass(frozen=True)
class GeometryReport:
    """Rows of `geometry_report`.

    Each row: `layer`, `family`; lists over heads `sigma_lower`, `sigma_upper` (interaction, without RoPE), `q_bound`,
    `k_bound`, `v_bound`, `logit_bound` (certificates, RoPE-safe), `worst_case_logit` (B₁ of arXiv 2602.18851); `alpha_min`
    (rank-aware; None where a per-head norm follows the projection); what calls saw with today's weights, None before one: `q_amax`,
    `k_amax`, `v_amax` (lists, largest entry after mixing), `logit_amax` (list) and `alpha_observed` (largest |logit| / B₁) with
    observe_logits; since patching: `utilisation` (largest entry / certificate; with delayed and current scaling, largest number
    before its cast / 448), `logit_utilisation` (the same of quantised logits, / 448), `overflows_by_operand`, `overflows` (their
    sum), `calls`, `front_end_calls` (of those, without a pass of elementwise work before the kernels), `front_end` ("fused", or why all
    calls go through the attention interface), `fallback_calls` and `fallback_reasons`. Recomputation under gradient checkpointing
    counts as a call of its own.
    Counts and maxima are of this process. Where FSDP2 shards the weights, certificates are those of the last forward (empty
    before one) and `sigma_upper`, `worst_case_logit`, `alpha_min` and `alpha_observed`, which need whole weights, stay empty.
    """

    rows: list[dict]

    COLUMNS: ClassVar = (
        *("layer", "σ lower", "σ upper", "|q| ≤", "|k| ≤", "|v| ≤", "|logit| ≤", "α min"),
        *(
            "max |q|",
            "max |k|",
            "max |v|",
            "max |logit|",
            "α observed",
            "utilisation",
            "overflows",
            "FP8 calls",
            "front end",
            "SDPA calls",
        ),
    )

    def to_markdown(self) -> str:
        """A table of the worst head of every layer."""
        lines = [self.COLUMNS, ["---"] * len(self.COLUMNS), *(self.cells(row) for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    @staticmethod
    def cells(row: dict) -> list[str]:
        """The table's cells of one row, as text; – where nothing was observed."""
        bounds = ("sigma_lower", "sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound")
        shares = [_share(row[name]) for name in ("alpha_min", "alpha_observed", "utilisation")]
        counts = [str(row[name]) for name in ("overflows", "calls", "front_end_calls", "fallback_calls")]
        seen = [_worst(row[name]) for name in _OBSERVED]
        return [str(row["layer"]), *(_worst(row[name]) for name in bounds), shares[0], *seen, *shares[1:], *counts]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _worst(values: list[float] | None) -> str:
    return f"{max(values):.4g}" if values else "–"


def _row(index: int, layer: PatchedLayer, model: Any, layers: int) -> dict:
    row: dict = {"layer": index, "family": model.config.model_type}
    row |= {name: [] for name in _BOUNDS}
    row |= dict.fromkeys(("alpha_min", "alpha_observed", "utilisation", *_OBSERVED))
    row |= {"logit_utilisation": None, "overflows_by_operand": {}}
    row |= {"overflows": 0, "calls": layer.calls, "fallback_calls": layer.delegated.total()}
    row |= {"front_end_calls": layer.front_end_calls, "front_end": layer.front_end}
    row["fallback_reasons"] = dict(layer.delegated)
    if isinstance(layer, GeoScaleLayer):
        row |= _measured(layer, model, layers)
    return row


def _measured(layer: GeoScaleLayer, model: Any, layers: int) -> dict:
    """The part of a row that only a layer running in FP8 has."""
    row: dict = {}
    worst_case = None
    layer.group.settle([layer])
    if layer.measurable:
        layer.refresh_if_stale()
        layer.group.settle([layer])
        query, key, _ = layer.site.projections()
        sigma, worst_case = measure_interaction(query, key, layer.site.softmax_scale)
        row["sigma_upper"], row["worst_case_logit"] = sigma.tolist(), worst_case.tolist()
        row["alpha_min"] = model_alpha_min(model, layer.site, layers, layer.config)
    layer.collect()
    if layer.geometry is not None:
        row |= {name: getattr(layer.geometry, name).tolist() for name in _CERTIFICATES}
    if layer.statistics.logit_amax is not None:
        amax = layer.statistics.logit_amax.double()
        row["logit_amax"] = amax.tolist()
        if worst_case is not None:
            row["alpha_observed"] = float((amax.to(worst_case.device) / worst_case).amax())
    for name, amax in layer.observed.items():
        row[f"{name}_amax"] = amax.double().tolist()
    row["utilisation"], row["logit_utilisation"] = layer.peak_utilisation, layer.peak_logit_utilisation
    row["overflows_by_operand"] = layer.statistics.overflows_by_operand
    row["overflows"] = sum(row["overflows_by_operand"].values())
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
