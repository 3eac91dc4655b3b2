"""`hf-geoscale inspect`."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..integrations import GeometryReport, geometry_report, patch_model
from ..kernels.backend import PLAIN, choose_kernels
from .failures import InputError
from .loading import load_model, load_tokenizer, read_text

LEGEND = {
    "σ": "spectral norm of the interaction W_Q W_Kᵀ of a head, gains included, without RoPE; no unit",
    "|q| ≤, |k| ≤, |v| ≤": "certificate: no entry is larger for any input, with RoPE; E4M3's 448 stands for this bound; no unit",
    "|logit| ≤": "certificate of softmax_scale · ⟨q, k⟩; nats",
    "used": "largest entry of the text / its certificate; 1 would be all of E4M3's range",
    "overflows": "entries of the text beyond E4M3, all calls",
}
"""Meaning of the columns. The worst head of each layer is shown."""

WIDE_LEGEND = {
    "σ lower, σ upper": "σ from below and from above",
    "α min": "rank-aware bound's share of the worst case, σ·d·softmax_scale (a reconstruction of arXiv 2602.18851)",
    "max, α observed": "largest of the text, and its share of the worst case",
}

WIDE = 400
"""Characters that hold every column; a table takes no more than it needs."""


def verdict(report: GeometryReport, tokens: int | None) -> str:
    """A line on the certificates and, with a text of so many tokens, on its overflows and utilisation."""
    rows = report.rows
    certified = sum(bool(row["q_bound"]) for row in rows)
    promise = f"{certified} of {len(rows)} layers are certified: no q, k or v overflows E4M3 there, for any input."
    if tokens is None:
        return promise
    worst = max(rows, key=lambda row: row["utilisation"] or 0.0)
    overflows = sum(row["overflows"] for row in rows)
    used = f"layer {worst['layer']} came nearest to its certificate ({worst['utilisation']:.0%})"
    if overflows:
        return f"{overflows} entries of {tokens} tokens overflowed; {used}. Please report it with `hf-geoscale env`."
    return f"{promise} In {tokens} tokens none did; {used}."


def backend_line() -> str:
    """The kernels that run FP8 attention on this machine, in a line."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name, reason = choose_kernels("auto", device)
    slower = ", a specification: slower than SDPA" if name == PLAIN else ""
    return f"FP8 attention on this machine ({device.type}): {name}{slower}{'' if reason is None else f' ({reason})'}."


def inspect_model(
    model: str, text: Path | None, max_tokens: int, as_json: bool, wide: bool, console: Console
) -> GeometryReport:
    """Print the geometry of a model's attention. With a text, the model runs once, and maxima are printed too.

    Raises:
        InputError, UnsupportedModelError: from loading the model or the text, or a model that cannot be patched.
    """
    words = None if text is None else read_text(str(text))
    busy = Console(stderr=True)
    with busy.status(f"Loading {model}"):
        tokenizer = None if words is None else load_tokenizer(model)
        loaded = load_model(model, patchable=True)
    patch_model(loaded, observe_logits=words is not None)
    tokens = None
    if words is not None and tokenizer is not None:
        most = min(max_tokens, getattr(loaded.config, "max_position_embeddings", None) or max_tokens)
        ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[:, :most]
        tokens = ids.shape[1]
        if not tokens:
            raise InputError(f"{text} gives no tokens")
        with torch.no_grad(), busy.status(f"Running {tokens} tokens"):
            loaded.eval()(input_ids=ids, use_cache=False)
    report = geometry_report(loaded)
    said = {"verdict": verdict(report, tokens), "backend": backend_line()}
    if as_json:
        legend = LEGEND | WIDE_LEGEND
        print(
            json.dumps(
                {"model": model, "hf_geoscale": __version__, **said, "legend": legend, "rows": report.rows}, indent=1
            )
        )
        return report
    if wide:
        Console(width=WIDE).print(_wide_table(report))
    else:
        console.print(_table(report, tokens is not None))
    console.print(f"{model}, worst head of each layer.", markup=False, highlight=False)
    console.print(said["verdict"], style="bold", highlight=False)
    console.print(said["backend"], markup=False, highlight=False)
    shown = LEGEND if tokens is not None else {name: LEGEND[name] for name in list(LEGEND)[:3]}
    for name, meaning in (shown | (WIDE_LEGEND if wide else {})).items():
        console.print(f"{name}: {meaning}", style="dim", markup=False, highlight=False)
    return report


def _worst(values: list[float]) -> str:
    return f"{max(values):.4g}" if values else "–"


def _table(report: GeometryReport, with_text: bool) -> Table:
    """The columns that fit 80 characters."""
    table = Table()
    for column in ("layer", "σ", "|q| ≤", "|k| ≤", "|v| ≤", "|logit| ≤", *(("used", "overflows") if with_text else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        cells = [_worst(row[name]) for name in ("sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound")]
        if with_text:
            used = row["utilisation"]
            cells += ["–" if used is None else f"{used:.3f}", str(row["overflows"])]
        table.add_row(str(row["layer"]), *cells)
    return table


def _wide_table(report: GeometryReport) -> Table:
    """All columns of the report, in a terminal of any width."""
    table = Table()
    for column in report.COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*report.cells(row))
    return table
