"""The page of benchmarks/span_scaling.py: tables, paired tests and the sentences that the numbers allow."""

import itertools
import math
import statistics

SIGNIFICANT = 0.05
SEEDS_MIN = 6
"""Fewest paired seeds whose sign-flip test can reach SIGNIFICANT: its p is at least 2/2ⁿ, 0.0625 with five."""

PUBLISHED = -0.56
"""Percent: the change of WikiText-2 validation loss that the abstract of arXiv 2512.13033 states."""


def chosen(records: list[dict], phase: str, arm: str, pair) -> list[dict]:
    found = [r for r in records if (r["phase"], r["arm"], tuple(r["pair"])) == (phase, arm, tuple(pair))]
    return sorted(found, key=lambda r: r["seed"])


def tuned(records: list[dict], arm: str, pair) -> dict[float, float]:
    """Mean held-out loss of each learning rate of the tuning."""
    rates: dict[float, list[float]] = {}
    for record in chosen(records, "tune", arm, pair):
        rates.setdefault(record["rate"], []).append(record["held_out"])
    return {rate: statistics.fmean(losses) for rate, losses in sorted(rates.items())}


def best_rate(records: list[dict], arm: str, pair) -> float:
    means = tuned(records, arm, pair)
    return min(means, key=means.__getitem__)


def sign_flip_p(differences: list[float]) -> float:
    """Exact two-sided p-value of a mean of 0, from all signs that the paired differences could have had."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= observed * (1 - 1e-12) for x in sums) / len(sums)


def least_p(seeds: int) -> float:
    """The p-value of differences that all have one sign."""
    return 2 / 2**seeds


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def complete(host: dict, records: list[dict]) -> tuple[dict, list[dict]]:
    """Without the comparison's seeds that a cut-off call left unfinished; `seeds` counts the rest."""
    compared: dict[int, int] = {}
    for record in records:
        if record["phase"] == "compare":
            compared[record["seed"]] = compared.get(record["seed"], 0) + 1
    whole = {seed for seed, runs in compared.items() if runs == 2 + 2 * len(host["pairs"])}
    kept = [r for r in records if r["phase"] != "compare" or r["seed"] in whole]
    return host | {"seeds": len(whole)}, kept


def paired(records: list[dict], arm: tuple, control: tuple) -> dict[str, float]:
    """Change of the held-out loss against a control, seed by seed, in percent of the control's mean: mean, spread and p."""
    ours, theirs = ([r["held_out"] for r in chosen(records, "compare", *x)] for x in (arm, control))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    unit = statistics.fmean(theirs) / 100
    return {
        "mean": statistics.fmean(differences) / unit,
        "spread": spread(differences) / unit,
        "p": sign_flip_p(differences),
    }


def percent(change: dict[str, float]) -> str:
    return f"{change['mean']:+.2f} ± {change['spread']:.2f} % (p = {change['p']:.3f})"


def selected(host: dict, records: list[dict]) -> tuple[float, float]:
    """The pair whose best rate had the lowest loss in the tuning of "span"."""
    return tuple(min(host["pairs"], key=lambda pair: min(tuned(records, "span", pair).values())))


def outcome(change: dict[str, float]) -> str:
    if change["p"] >= SIGNIFICANT:
        return "cannot be told apart from"
    return "is lower than" if change["mean"] < 0 else "is higher than"


def verdict(host: dict, records: list[dict]) -> str:
    if host["seeds"] < SEEDS_MIN:
        return (
            f"**Too few seeds for a verdict**: {host['seeds']}, where the sign-flip test's p is at least "
            f"{least_p(host['seeds']):.3g}; {SEEDS_MIN} are needed for p < {SIGNIFICANT:g}."
        )
    pair = selected(host, records)
    plain = paired(records, ("span", pair), ("plain", (1.0, 1.0)))
    random = paired(records, ("span", pair), ("random", pair))
    helps = outcome(plain) == outcome(random) == "is lower than"
    found = (
        "The spans help in this set-up, against both controls"
        if helps
        else "No gain from the spans is shown here: that would take a lower loss than both controls"
    )
    return (
        f"The pair chosen in the tuning, a_parallel = {pair[0]:g} and a_perpendicular = {pair[1]:g}: its held-out loss "
        f"{outcome(plain)} that of plain gradients, {percent(plain)}, and {outcome(random)} that of random subspaces under the "
        f"same factors, {percent(random)}. **{found}**, at p < {SIGNIFICANT:g}, in {host['seeds']} paired seeds (the least "
        f"p that so many can give is {least_p(host['seeds']):.3g}). The abstract "
        f"states {PUBLISHED} % on WikiText-2, in a set-up we do not know."
    )


def row(records: list[dict], arm: str, pair) -> str:
    losses = [r["held_out"] for r in chosen(records, "compare", arm, pair)]
    rate = chosen(records, "compare", arm, pair)[0]["rate"]
    cells = [
        arm,
        f"{pair[0]:g}, {pair[1]:g}",
        f"{rate:g}",
        f"{statistics.fmean(losses):.4f} ± {spread(losses):.4f}",
    ]
    cells.append("–" if arm == "plain" else percent(paired(records, (arm, pair), ("plain", (1.0, 1.0)))))
    cells.append(percent(paired(records, (arm, pair), ("random", pair))) if arm == "span" else "–")
    return f"| {' | '.join(cells)} |"


def edges(host: dict, records: list[dict]) -> str:
    """Which best rates lie at the edge of those tried."""
    arms = [("plain", (1.0, 1.0)), *((arm, pair) for pair in host["pairs"] for arm in ("span", "random"))]
    found = [
        f"{arm} ({pair[0]:g}, {pair[1]:g})"
        for arm, pair in arms
        if best_rate(records, arm, pair) in (min(tuned(records, arm, pair)), max(tuned(records, arm, pair)))
    ]
    return f"At the edge of the rates tried: {', '.join(found) or 'none'}."


def setup_of(host: dict, records: list[dict]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    return (
        f"GPT-2 of {host['layers']} layers, width {host['width']}, {host['heads']} heads of {host['width'] // host['heads']}, from "
        f"random weights, FP8 attention without the fused front end; bytes of the manual that ships with Python; "
        f"{host['steps']} AdamW steps of "
        f"{host['batch']} × {host['length']} bytes (β 0.9 and 0.95, decay 0.1, clip 1, warm-up and cosine), the last "
        f"{host['held_out']} sequences held out. {host['device']}, driver {host['driver']}, {versions}, commit "
        f"{', '.join(sorted({r['commit'] for r in records}))}; {len(records)} runs, {host['workers']} at a time, of "
        f"{sum(r['seconds'] for r in records) / 60:.1f} minutes in sum; {sum(r['overflows'] for r in records)} overflows."
    )


def protocol_of(host: dict, records: list[dict]) -> str:
    counts = {arm: sum((r["phase"], r["arm"]) == ("tune", arm) for r in records) for arm in ("plain", "span", "random")}
    return (
        f"Tuning, on seeds {', '.join(map(str, host['tuning_seeds']))}: {counts['plain']} runs of plain gradients, "
        f"{counts['span']} of spans, {counts['random']} of random subspaces. Comparison, on seeds 0 to {host['seeds'] - 1}: nats a "
        "byte held out, mean ± standard deviation over seeds; changes are paired by seed, in percent of the control's mean, with "
        "the exact two-sided sign-flip test. Only the verdict's pair was chosen beforehand; the other rows are a look around, and "
        "their p-values are not corrected for it."
    )


def notes_of(host: dict, records: list[dict]) -> str:
    return (
        f"{edges(host, records)} Random: a fresh random subspace of {host['width'] // host['heads']} dimensions per head, sequence "
        "and call, scaled the same way. Uniform: dQ, dK and dV times one factor, at the rate of plain, not tuned. Multiplying the "
        "whole gradient by a factor is no control: Adam divides it out again. The same holds for the projections' own weights "
        "under a uniform factor on dQ, dK and dV; what it changes is the share of attention in what reaches the layers below."
    )


def to_markdown(host: dict, records: list[dict]) -> str:
    """The page, of the host's line and one record a run.

    Raises:
        ValueError: no seed of the comparison is complete.
    """
    host, records = complete(host, records)
    if not host["seeds"]:
        raise ValueError(
            "a page needs one complete seed of the comparison, got none; call with the same --output to go on"
        )
    arms = [("plain", (1.0, 1.0)), *((arm, pair) for pair in host["pairs"] for arm in ("span", "random"))]
    lines = [
        "# Span scaling",
        "",
        "Generated by `python benchmarks/span_scaling.py`. **A reconstruction from the abstract of arXiv 2512.13033, whose body",
        "was not available**: projector, coefficients and set-up are ours (`hf_geoscale/stability/span.py`), so this page measures",
        "our reconstruction and neither confirms nor refutes the paper.",
        "",
        "`patch_model(model, span_scaling=SpanScaling(a_parallel, a_perpendicular))` for a patched model,",
        "`scale_span_gradients(query, key, value, scaling)` in front of any other attention function. The forward is untouched; a",
        "patched model goes without its fused front end, since spans are those of rotated queries and keys. What it costs:",
        "[span_cost.md](span_cost.md). How much of the gradients is parallel: [span_operands.md](span_operands.md).",
        "",
        verdict(host, records),
        "",
        setup_of(host, records),
        "",
        protocol_of(host, records),
        "",
        "| gradients | a_parallel, a_perpendicular | rate | held-out loss | against plain | against random |",
        "|---|---|---|---|---|---|",
        *(row(records, arm, pair) for arm, pair in [*arms, ("uniform", host["uniform"])]),
        "",
        notes_of(host, records),
        "",
        "Tuning, mean held-out loss by learning rate:",
        "",
        "| gradients | a_parallel, a_perpendicular | rate: loss |",
        "|---|---|---|",
    ]
    for arm, pair in arms:
        losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tuned(records, arm, pair).items())
        lines.append(f"| {arm} | {pair[0]:g}, {pair[1]:g} | {losses} |")
    return "\n".join(lines)
