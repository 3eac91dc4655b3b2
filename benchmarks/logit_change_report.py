"""Page and figure of benchmarks/logit_change.py, from its records."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

CONTROLS = (
    "plain",
    "fixed factor, τ = 0.1",
    "q/k norm",
    "QK-Clip, observed",
    "QK-Clip, certificate",
    "QuacK, τ = 1",
    "QuacK, τ = 0.1",
)

RISE = 0.1
"""Nats that a run may end above its lowest held-out loss without having diverged."""

LEARNT = 0.3
"""Nats below the entropy of the byte frequencies that a run which learnt ends at, at least."""

LITTLE = "°"
"""Marks a cell whose mean loss is of runs of which some learnt too little."""

Sweep = dict[float, list[dict]]  # rate → its runs, a seed each


def diverged(record: dict) -> bool:
    """A loss that is not finite, or an end more than RISE above the run's own lowest held-out loss."""
    held_out = [loss for _, loss, _ in record["probes"]]
    finite = _finished(record) and all(map(math.isfinite, held_out))
    return not finite or held_out[-1] > min(held_out) + RISE


def learnt_little(record: dict, entropy: float) -> bool:
    """Whether a run that did not diverge ends less than LEARNT below the entropy of the byte frequencies."""
    return not diverged(record) and record["probes"][-1][1] > entropy - LEARNT


def _finished(record: dict) -> bool:
    return len(record["losses"]) == record["steps"] and all(map(math.isfinite, record["losses"]))


def sweeps(records: list[dict]) -> dict[tuple[str, str, str], Sweep]:
    """(optimizer, attention, control) → its sweep, rates ascending; in one order, whichever run ended first."""
    found: dict[tuple[str, str, str], Sweep] = defaultdict(lambda: defaultdict(list))
    ordered = sorted(records, key=lambda r: (r["optimizer"], r["attention"], CONTROLS.index(r["control"]), r["seed"]))
    for record in ordered:
        found[record["optimizer"], record["attention"], record["control"]][record["rate"]].append(record)
    return {name: dict(sorted(sweep.items())) for name, sweep in found.items()}


def highest_stable_rate(sweep: Sweep) -> float | None:
    """Largest rate at which, and below which, no seed diverged; None if one did at the lowest."""
    highest = None
    for rate, runs in sweep.items():
        if any(map(diverged, runs)):
            break
        highest = rate
    return highest


def highest_training_rate(sweep: Sweep, entropy: float) -> float | None:
    """Largest rate at which no seed diverged or learnt too little; None if there is none."""
    good = [rate for rate, runs in sweep.items() if not any(diverged(r) or learnt_little(r, entropy) for r in runs)]
    return max(good, default=None)


def _label(highest: float | None, sweep: Sweep) -> str:
    """ "≥ x" where that is the sweep's last rate: the highest lies there or beyond."""
    if highest is None:
        return "none"
    return f"≥ {highest:g}" if highest == max(sweep) else f"{highest:g}"


def verdict(optimizer: str, attention: str, ours: dict[str, Sweep], entropy: float) -> str:
    """What the sweeps of an optimizer and attention, by method, say of the highest rates that are stable and that train."""
    runs = [run for sweep in ours.values() for group in sweep.values() for run in group]
    count, where = sum(map(diverged, runs)), f"{optimizer}, {attention} attention"
    stable = ", ".join(f"{control} {_label(highest_stable_rate(sweep), sweep)}" for control, sweep in ours.items())
    trains = ", ".join(f"{name} {_label(highest_training_rate(sweep, entropy), sweep)}" for name, sweep in ours.items())
    found = f"{count} of the {len(runs)} runs diverged; highest stable rates: {stable}."
    if not count:
        found = f"none of the {len(runs)} runs diverged: the highest stable rate was not found, of any method."
    return f"- {where}: {found} Highest rates that train: {trains}."


def _spread(values: list[float]) -> str:
    if not values or not all(map(math.isfinite, values)):
        return "not finite"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _cell(runs: list[dict], entropy: float) -> str:
    """Held-out loss at the end; how many seeds diverged, if any did, and whether some learnt too little."""
    last = [run["probes"][-1][1] if _finished(run) and run["probes"] else math.nan for run in runs]
    little, broken = any(learnt_little(run, entropy) for run in runs), sum(map(diverged, runs))
    return _spread(last) + (LITTLE if little else "") + (f" ({broken}/{len(runs)} diverged)" if broken else "")


def _largest_logit(runs: list[dict]) -> str:
    seen = [logit for run in runs for *_, logit in run["probes"] if math.isfinite(logit)]
    return f"{max(seen):.3g}" if seen else "–"


def _seeds(ours: dict[tuple[str, str], Sweep]) -> str:
    """How many seeds the cells of one optimizer have."""
    counts = sorted({len(runs) for sweep in ours.values() for runs in sweep.values()})
    return " or ".join(map(str, counts))


def _tables(optimizer: str, found: dict[tuple[str, str, str], Sweep], entropy: float) -> list[str]:
    """Losses and largest logits over the rates; overflows and clips, added up over a sweep."""
    ours = {name[1:]: sweep for name, sweep in found.items() if name[0] == optimizer}
    rates = sorted({rate for sweep in ours.values() for rate in sweep})
    columns = [f"{rate:g}" for rate in rates]
    lines = [
        f"## {optimizer}",
        "",
        f"Held-out loss at the end, nats a byte, mean ± standard deviation over seeds; {_seeds(ours)} seeds a cell.",
        "",
        f"| attention | method | highest stable | highest that trains | {' | '.join(columns)} | FP8 overflows | heads clipped |",
        "|---|---|---|---|" + "---|" * (len(rates) + 2),
    ]
    for (attention, control), sweep in ours.items():
        cells = [_cell(sweep[rate], entropy) if rate in sweep else "–" for rate in rates]
        runs = [run for group in sweep.values() for run in group]
        counts = [f"{sum(run[name] for run in runs):,}" for name in ("overflows", "clipped_heads")]
        counts[0] = counts[0] if attention == "FP8" else "–"
        counts[1] = counts[1] if control.startswith("QK-Clip") else "–"
        highest = highest_stable_rate(sweep), highest_training_rate(sweep, entropy)
        labels = [_label(rate, sweep) for rate in highest]
        lines.append(f"| {' | '.join([attention, control, *labels, *cells, *counts])} |")
    lines += [
        "",
        "Largest |logit| at any probe (softmax scale included, before the softmax), of all seeds.",
        "",
        f"| attention | method | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(rates),
    ]
    for (attention, control), sweep in ours.items():
        cells = [_largest_logit(sweep[rate]) if rate in sweep else "–" for rate in rates]
        lines.append(f"| {attention} | {control} | {' | '.join(cells)} |")
    return [*lines, ""]


def _rule(host: dict) -> list[str]:
    """What counts as diverged, and what was known when that was written."""
    return [
        f"Diverged: a loss that is not finite, or a last held-out loss more than {RISE:g} nats above the run's own lowest.",
        "Highest stable rate: the largest of the sweep at which, and below which, no seed diverged.",
        f"{LITTLE}: some seed did not diverge but learnt too little, ending less than {LEARNT:g} below the entropy of the byte",
        f"frequencies, {host['byte_entropy']:.3f}. Highest rate that trains: the largest at which no seed diverged or learnt too",
        "little, whatever lower rates did. ≥ where that is the sweep's last: it lies there or beyond.",
        "",
        *host["history"].split("\n"),
    ]


def to_markdown(host: dict, records: list[dict]) -> str:
    found = sweeps(records)
    seeds, first = sorted({record["seed"] for record in records}), records[0]
    lines = [
        "# Learning rates and logit-change control",
        "",
        f"Generated by `{host['command']}`: {host['device']}, driver {host['driver']}, torch {host['torch']}, Triton",
        f"{host['triton']}, transformers {host['transformers']}, commit {host['commit']}. {len(records)} of {host['runs']} runs,",
        f"seeds {', '.join(map(str, seeds))} (weights and order of data).",
        "",
        f"A Llama of {first['layers']} layers, width {first['width']}, trained from scratch on the bytes of Python's manual:",
        f"{first['steps']} steps of {first['batch']} × {first['length']} bytes, BF16 autocast, a constant rate after",
        f"warm-up. QK-Clip's threshold is {host['threshold']:g}. One small model and few steps: no statement about large ones.",
        "",
        *_rule(host),
        "",
    ]
    for panel in dict.fromkeys(name[:2] for name in found):
        ours = {name[2]: sweep for name, sweep in found.items() if name[:2] == panel}
        lines.append(verdict(*panel, ours, host["byte_entropy"]))
    lines.append("")
    for optimizer in dict.fromkeys(optimizer for optimizer, *_ in found):
        lines += _tables(optimizer, found, host["byte_entropy"])
    return "\n".join(lines).rstrip() + "\n"


def plot(host: dict, records: list[dict], path: Path) -> None:
    """Mean held-out loss at the end over the rate, a panel an optimizer and attention, cut off at the byte entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, limit = sweeps(records), host["byte_entropy"]
    panels = list(dict.fromkeys(name[:2] for name in found))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for (*where, control), sweep in found.items():
            if tuple(where) != panel:
                continue
            last = [[run["probes"][-1][1] if _finished(run) else limit for run in runs] for runs in sweep.values()]
            means = [fmean(min(x, limit) if math.isfinite(x) else limit for x in losses) for losses in last]
            axis.plot(list(sweep), means, marker="o", markersize=3, label=control)
        rates = sorted({rate for name, sweep in found.items() if name[:2] == panel for rate in sweep})
        axis.set(title=", ".join(panel), xscale="log", xlabel="learning rate")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
    axes[0][0].set_ylabel("held-out loss at the end, nats a byte")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
