"""`hf-geoscale inspect`."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..integrations import GeometryReport, geometry_report, patch_model
from .loading import load, read_text


def inspect_model(model: str, text: Path | None, max_tokens: int, as_json: bool, console: Console) -> GeometryReport:
    """Print the geometry of a model's attention; with a text, run it once and print what it reached.

    Raises:
        ValueError, OSError: from loading the model or the text, or a model that cannot be patched.
    """
    words = None if text is None else read_text(str(text))
    busy = Console(stderr=True)
    with busy.status(f"Loading {model}"):
        loaded, tokenizer = load(model)
    patch_model(loaded, observe_logits=words is not None)
    if words is not None:
        ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[:, :max_tokens]
        with torch.no_grad(), busy.status(f"Running {ids.shape[1]} tokens"):
            loaded.eval()(input_ids=ids, use_cache=False)
    report = geometry_report(loaded)
    if as_json:
        print(json.dumps({"model": model, "rows": report.rows}, indent=1))
    else:
        console.print(_table(model, report))
        console.print(
            "Worst head of each layer. σ: interaction W_Q W_Kᵀ without RoPE, from below and above. Certificates bound every "
            "input, RoPE included. α: share of σ·d·softmax_scale (rank-aware theory; observed with --text).",
            style="dim",
        )
    return report


def _table(model: str, report: GeometryReport) -> Table:
    table = Table(title=f"Attention geometry of {model}")
    for column in report.COLUMNS:
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(*report.cells(row))
    return table
