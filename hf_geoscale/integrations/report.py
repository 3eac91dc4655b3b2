"""`geometry_report`: what the weights promise and what the calls saw, a row a layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..geometry import measure_interaction
from .layer import GeoScaleLayer, PatchedLayer, model_alpha_min
from .patched import left_out, patched_layers, patched_modules, torch_module, warn_of_left_out

_CERTIFICATES = ("sigma_lower", "q_bound", "k_bound", "v_bound", "logit_bound")
_BOUNDS = (*_CERTIFICATES, "sigma_upper", "worst_case_logit")

_BAR = r"\|"
"""A bar inside a cell: a bare one would end it."""

_OBSERVED = ("q_amax", "k_amax", "v_amax", "logit_amax")


@dataclass(frozen=True, repr=False)
class GeometryReport:
    """Rows of `geometry_report`, a dict a layer. `print` shows a short table, `to_markdown` all of it.

    Names of the layer: `layer` (int), `family`.

    Promises of the weights, lists over heads: `sigma_lower` and `sigma_upper` (interaction, without RoPE); `q_bound`, `k_bound`,
    `v_bound` and `logit_bound` (certificates, RoPE-safe); `worst_case_logit` (B₁ of arXiv 2602.18851). And one number: `alpha_min`
    (rank-aware; None where a per-head norm follows the projection).

    Observed since the last refresh of the scales; before a call, between the last two refreshes that had calls between them; None
    without a call. Lists over heads: `q_amax`, `k_amax` and `v_amax` (largest entry after mixing), and with observe_logits
    `logit_amax`. A number, of today's weights alone: `alpha_observed` (largest |logit| / B₁).

    Counted since patching: `calls`, `overflows`, `overflows_by_operand`, `fallback_calls`, `fallback_reasons`; `front_end_calls`
    (calls without a pass of elementwise work before the kernels) and `front_end` ("fused", or why all calls go through the
    attention interface). Recomputation under gradient checkpointing is a call of its own. Largest since patching: `utilisation`
    (entry / certificate; with delayed and current scaling, number before its cast / 448) and `logit_utilisation` (of quantised
    logits, / 448).

    Path: `kernels`, "Hopper kernels", "portable Triton kernels" or "plain PyTorch". It names what ran the calls, most used first
    where they differed. Before a call it names what would run, and "none" where nothing can. `kernel_calls` counts calls by name.

    Counts and maxima are of this process. Where FSDP2 shards the weights, certificates are those of the last forward, empty before
    one; `sigma_upper`, `worst_case_logit`, `alpha_min` and `alpha_observed` need whole weights, and stay empty.
    """

    rows: list[dict]

    COLUMNS: ClassVar = (
        *("layer", "σ lower", "σ upper", "|q| ≤", "|k| ≤", "|v| ≤", "|logit| ≤", "α min"),
        *("max |q|", "max |k|", "max |v|", "max |logit|", "α observed"),
        *("utilisation", "overflows", "FP8 calls", "front end", "SDPA calls", "kernels"),
    )

    SHORT: ClassVar = (
        "layer",
        "|q| ≤",
        "|k| ≤",
        "|v| ≤",
        "|logit| ≤",
        "utilisation",
        "overflows",
        "FP8 calls",
        "SDPA calls",
    )
    """Columns that `print` shows."""

    def to_markdown(self) -> str:
        """A table in GitHub's Markdown of the worst head of every layer."""
        lines = [self.COLUMNS, ["---"] * len(self.COLUMNS), *(self.cells(row) for row in self.rows)]
        return "".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |\n" for line in lines)

    @classmethod
    def cells(cls, row: dict) -> list[str]:
        """The table's cells of one row, as text; – where nothing was observed."""
        bounds = ("sigma_lower", "sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound")
        shares = [_share(row[name]) for name in ("alpha_min", "alpha_observed", "utilisation")]
        counts = [str(row[name]) for name in ("overflows", "calls", "front_end_calls", "fallback_calls", "kernels")]
        seen = [_worst(row[name]) for name in _OBSERVED]
        return [str(row["layer"]), *(_worst(row[name]) for name in bounds), shares[0], *seen, *shares[1:], *counts]

    def __str__(self) -> str:
        places = [self.COLUMNS.index(name) for name in self.SHORT]
        table = [list(self.SHORT), *([self.cells(row)[place] for place in places] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([repr(self), *lines])

    def __repr__(self) -> str:
        families = ", ".join(dict.fromkeys(row["family"] for row in self.rows))
        kernels = ", ".join(dict.fromkeys(row["kernels"] for row in self.rows))
        return f"GeometryReport({_layers(len(self.rows))} of {families}: {kernels})"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _worst(values: list[float] | None) -> str:
    return f"{max(values):.4g}" if values else "–"


def _row(index: int, layer: PatchedLayer, layers: int) -> dict:
    row: dict = {"layer": index, "family": layer.family}
    row |= {name: [] for name in _BOUNDS}
    row |= dict.fromkeys(("alpha_min", "alpha_observed", "utilisation", *_OBSERVED))
    row |= {"logit_utilisation": None, "overflows_by_operand": {}}
    row |= {"overflows": 0, "calls": layer.calls, "fallback_calls": layer.delegated.total()}
    row |= {"front_end_calls": layer.front_end_calls, "front_end": layer.elsewhere or layer.front_end}
    row |= {"kernels": layer.kernels, "kernel_calls": {}}
    row["fallback_reasons"] = dict(layer.delegated)
    if isinstance(layer, GeoScaleLayer):
        row |= _measured(layer, layers)
    return row


def _measured(layer: GeoScaleLayer, layers: int) -> dict:
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
        row["alpha_min"] = model_alpha_min(layer.site, layers, layer.config)
    seen, logit_amax = layer.seen(), layer.statistics.logit_amax
    if layer.geometry is not None:
        row |= {name: getattr(layer.geometry, name).tolist() for name in _CERTIFICATES}
    if logit_amax is not None and worst_case is not None:
        row["alpha_observed"] = float((logit_amax.to(worst_case.device).double() / worst_case).amax())
    if (logits_seen := layer.logits_seen()) is not None:
        row["logit_amax"] = logits_seen.tolist()
    for name, amax in seen.items():
        row[f"{name}_amax"] = amax.tolist()
    row["utilisation"], row["logit_utilisation"] = layer.peak_utilisation, layer.peak_logit_utilisation
    row["overflows_by_operand"] = layer.statistics.overflows_by_operand
    row["kernel_calls"] = dict(layer.kernel_calls)
    row["overflows"] = sum(row["overflows_by_operand"].values())
    return row


def geometry_report(model: Any) -> GeometryReport:
    """Certificates, rank-aware bound and counters of every patched layer.

        >>> report = geometry_report(patch_model(model))
        >>> report.rows[0]["kernels"]
        'Hopper kernels'

    Args:
        model: a patched model, or any module around one or several, whose layers are numbered through.
    Raises:
        ValueError: the model is not patched. TypeError: no module.
    """
    model = torch_module(model, "geometry_report")
    layers = patched_layers(model)
    if not layers:
        raise ValueError("geometry_report needs a patched model: call patch_model(model) first")
    added = left_out(model)
    warn_of_left_out(layers, added)
    states = dict(patched_modules(model)) | added
    rows = [states[module] for module in model.modules() if module in states] if added else layers
    return GeometryReport([_row(index, layer, len(rows)) for index, layer in enumerate(rows)])
