"""Tables of benchmarks/accuracy.py, from its records."""

import math

from accuracy_modes import FP8, REFERENCE
from accuracy_tasks import SUITES

AGREEMENT = 0.97
"""Share of items at which a mode should give BF16's answer."""
PHASES = {
    "before": "Before fine-tuning",
    "after": "After {steps} AdamW steps of {batch} × {length} tokens ({text}; rate {learning_rate}, seed {seed})",
}
SUBSET = """**A subset of the items**, evenly spaced over each set, the same every time. It can show no loss of accuracy smaller
than its errors; where no item changed (± 0.0), n items leave room for changes in 3/n of all. Agreement and KL tell more."""
ABOUT = """Values with their standard error; accuracies in per cent. "− BF16" is the difference, with the standard error of the
items' own differences (paired). Agreement: items whose chosen answer is BF16's (LAMBADA: the first choice of every token;
perplexity: share of tokens). KL(BF16 ‖ mode), a scored token. "eager" is BF16 again by another implementation: its difference
is rounding alone, and what of FP8's is no larger is not FP8's doing. Perplexity is of Wikipedia passages (BoolQ), a token;
those of the gate gave {gate:.1f}. After fine-tuning every mode has weights of its own, trained in it on the same batches."""


def merge(runs: list[list[dict]]) -> list[dict]:
    """Runs of different tasks, which ran side by side to save time, as if they had been one.

    Raises:
        ValueError: they differ in more than their tasks, trained weights included, or a task is in two of them.
    """
    first, *others = runs
    common = [row for row in first if "weights" in row or "versions" in row]
    names: set[str] = set()
    for run in runs:
        tasks = {row["task"] for row in run if "task" in row}
        if [row for row in run if "weights" in row or "versions" in row] != common:
            raise ValueError("the runs differ in model, settings, versions or trained weights")
        if tasks & names:
            raise ValueError(f"more than one run of {', '.join(sorted(tasks & names))}")
        names |= tasks
    order = {name: i for i, name in enumerate(SUITES)}
    counts = [row for run in runs for row in run if "fallback_calls" in row]
    results = sorted((row for run in runs for row in run if "task" in row), key=lambda row: order[row["task"]])
    return [*common, *results, *counts] if others else first


def verdict(row: dict) -> tuple[str, str]:
    """Whether the difference from BF16 is within two standard errors of the value, and of the paired difference."""
    return tuple("yes" if abs(row["difference"]) <= 2 * row[x] else "no" for x in ("stderr", "difference_stderr"))


def outlier(row: dict) -> str:
    """A difference in its own standard errors, in words."""
    errors = abs(row["difference"]) / row["difference_stderr"] if row["difference_stderr"] else math.inf
    return f"{row['task']}, {row['mode']}, {row['phase']} fine-tuning, by {errors:.1f} standard errors"


def agreements(rows: list[dict], phase: str) -> list[str]:
    """A line a mode: on which tasks it picks BF16's answer for AGREEMENT of the items, and what it reaches elsewhere."""
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows if row["mode"] != REFERENCE):
        mine = [row for row in rows if row["mode"] == mode and row["phase"] == phase]
        reached = [row["task"] for row in mine if row["agreement"] >= AGREEMENT]
        missed = [f"{row['task']} {row['agreement']:.1%}" for row in mine if row["agreement"] < AGREEMENT]
        lines.append(f"- {mode}, {phase}: {', '.join(reached) or 'none'}; below: {', '.join(missed) or 'none'}.")
    return lines


def table(rows: list[dict]) -> list[str]:
    """Lines of one phase: the metric that names a suite, a line a task and mode."""
    lines = [
        "| task | items | metric | mode | value | − BF16 | ≤ 2 s.e. | ≤ 2 paired s.e. | agreement | KL, nats a token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in rows if r["metric"] == SUITES[r["task"]].metric):
        share = row["metric"] != "perplexity"
        digits, unit = (1, 100) if share else (2, 1)
        value, error = f"{unit * row['value']:.{digits}f}", f"{unit * row['stderr']:.{digits}f}"
        items = f"{row['items']:,} of {row['available']:,}"
        cells = [row["task"], items, row["metric"], row["mode"], f"{value} ± {error}"]
        if row["mode"] == REFERENCE:
            cells += ["–"] * 5
        else:
            gap, error = f"{unit * row['difference']:+.{digits}f}", f"{unit * row['difference_stderr']:.{digits}f}"
            kl = f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}"
            cells += [f"{gap} ± {error}", *verdict(row), f"{row['agreement']:.1%}", kl]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def to_markdown(rows: list[dict]) -> str:
    """The page of a run: what was measured, a table a phase, and how often FP8 lies within two standard errors."""
    host, *rest = rows
    results = [row for row in rest if "task" in row]
    shown = [r for r in results if r["metric"] == SUITES[r["task"]].metric]
    fp8 = [r for r in shown if r["mode"] in FP8]
    counts = [sum(verdict(r)[i] == "yes" for r in fp8) for i in range(2)]
    outside = [r for r in fp8 if verdict(r)[1] == "no"]
    calls = [row for row in rest if "fallback_calls" in row]
    part = any(r["items"] < r["available"] for r in results)
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    kernels = " (FP8 by the reference implementation)" if host["device"] == "cpu" else ""
    lines = [
        f"Generated by `python benchmarks/accuracy.py`: {host['model']}, data from {host['data']}, {host['device']}{kernels},",
        f"{versions}, commit {host['commit']}. MMLU with {host['shots']} few-shot examples.",
        "",
        SUBSET if part else "Every item of each set.",
        "",
        ABOUT.format(gate=host["gate_perplexity"]),
        "",
        f"Of {len(fp8)} comparisons of an FP8 mode with BF16, {counts[0]} lie within two standard errors of the value",
        f"and {counts[1]} within two of the paired difference, where chance alone leaves one in twenty outside. Outside here:",
        ("; ".join(map(outlier, outside)) or "none") + ".",
        f"FP8 values that left their range: {sum(row.get('overflows') or 0 for row in rest)}, training included; "
        f"calls left to SDPA: {sum(row['fallback_calls'] for row in calls)}.",
        "",
        f"Tasks on which a mode picks BF16's answer for {AGREEMENT:.0%} of the items or more:",
        "",
        *(line for phase in dict.fromkeys(row["phase"] for row in shown) for line in agreements(shown, phase)),
    ]
    for phase, title in PHASES.items():
        chosen = [row for row in results if row["phase"] == phase]
        if chosen:
            lines += ["", f"**{title.format(**host['finetune'])}**", "", *table(chosen)]
    training = [row for row in rest if row["phase"] == "training"]
    if training:
        lines += ["", "| mode | first training loss | mean of the last five |", "|---|---|---|"]
        for row in training:
            last = row["losses"][-5:]
            lines.append(f"| {row['mode']} | {row['losses'][0]:.4f} | {sum(last) / len(last):.4f} |")
    return "\n".join(lines) + "\n"
