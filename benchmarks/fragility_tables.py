"""docs/fragility.md and its figure, from the records of benchmarks/fragility.py."""

from pathlib import Path
from statistics import fmean, median, stdev
from textwrap import fill

from fragility_layers import OURS, verdict
from fragility_nulls import circular_shift_p, differences, spearman
from fragility_training import BLOW_UP, RAMP_FACTOR, SPIKE
from fragility_warnings import RULE, TUNING_SEEDS, with_warnings

DIGITS = {"bfloat16": "BF16", "float16": "FP16", "float8_e4m3": "FP8 attention"}

METHOD_OF_LAYERS = (
    "One layer's attention in low precision at a time (q, k and v in BF16 first), all else in float32; the measure is "
    "‖y_low − y_FP32‖/‖y_FP32‖ on the logits. Rank correlation (Spearman) over the layers of a model, mean ± "
    "standard deviation over "
    "settings (training step, length), which share weights and text and are not independent. p: median over "
    "settings of the share of "
    "circular shifts over the layers that correlate as well; with n layers it is never below 1/n."
)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _paragraph(text: str) -> list[str]:
    return [*fill(text, 128, break_long_words=False, break_on_hyphens=False).splitlines(), ""]


def _spread(values: list[float]) -> str:
    return f"{fmean(values):+.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:+.2f}"


def _layers(records: list[dict]) -> list[str]:
    lines = ["## Which layers are fragile", "", *_paragraph(verdict(records)), *_paragraph(METHOD_OF_LAYERS)]
    for precision in ("float8_e4m3", "bfloat16"):
        mine = [r for r in records if r["kind"] == "layers" and r["precision"] == precision]
        models = list(dict.fromkeys(r["model"] for r in mine))
        rows = []
        for name in mine[0]["scores"]:
            cells = [name]
            for model in models:
                own = [r for r in mine if r["model"] == model]
                cells.append(_spread([spearman(r["scores"][name], r["measured"]) for r in own]))
                cells.append(f"{median(circular_shift_p(r['scores'][name], r['measured']) for r in own):.2f}")
            rows.append(cells)
        counts = {m: sum(r["model"] == m for r in mine) for m in models}
        head = ["score"]
        for model in models:
            layers = len(next(r for r in mine if r["model"] == model)["measured"])
            head += [f"{model}, {layers} layers, {counts[model]} settings", "p"]
        lines += [f"**{DIGITS[precision]}**", "", *_table(head, rows)]
    return lines


def _lengths(records: list[dict]) -> list[str]:
    mine = [r for r in records if r["kind"] == "lengths"]
    rows = []
    for r in mine:
        cells = [r["model"], str(r["step"]), str(r["length"])]
        for precision in DIGITS:
            cells += [f"{r['predicted'][precision]:.3g}", f"{r['measured'][precision]:.2g}"]
        rows.append(cells)
    head = ["model", "step", "length"]
    for name in DIGITS.values():
        head += [f"{name}: Σ risk", "measured"]
    pairs = [(r["predicted"][p], r["measured"][p]) for r in mine for p in DIGITS if r["measured"][p] > 0]
    ratios = [a / b for a, b in pairs]
    text = (
        f"The whole model in low precision. The sum of risks exceeds the measured mismatch {min(ratios):.3g} to {max(ratios):.3g} "
        "times: it is a sum of bounds, for ranking only."
    )
    return ["## Lengths and precisions", "", *_paragraph(text), *_table(head, rows)]


def _series(records: list[dict]) -> list[str]:
    mine = [r for r in records if r["kind"] == "series"]
    rows = []
    for model, seed in dict.fromkeys((r["model"], r["seed"]) for r in mine):
        own = [r for r in mine if (r["model"], r["seed"]) == (model, seed)]
        for precision in ("bfloat16", "float8_e4m3"):
            x, y = ([r[what][precision] for r in own] for what in ("predicted", "measured"))
            dx, dy = differences(x), differences(y)
            cells = [model, str(seed), DIGITS[precision], str(len(own))]
            cells += [f"{spearman(x, y):+.2f}", f"{circular_shift_p(x, y):.2f}"]
            cells += [f"{spearman(dx, dy):+.2f}", f"{circular_shift_p(dx, dy):.2f}"]
            rows.append(cells)
    changes = [float(row[6]) for row in rows]
    chance = sum(float(row[7]) <= 0.05 for row in rows)
    text = (
        "Σ risk against the measured mismatch of the whole model on one held-out sequence, over training. p: share of circular "
        "shifts of the series that correlate as well. Two series that both rise pass that test whatever they have to do with each "
        f"other, so the changes of their logarithms count: there the mean correlation is {fmean(changes):+.2f}, and p ≤ 0.05 in "
        f"{chance} of {len(rows)} series."
    )
    head = ["model", "seed", "precision", "observations", "correlation", "p", "of changes", "p"]
    return ["## Over training steps", "", *_paragraph(text), *_table(head, rows)]


def _first(warned: list[int], start: int, end: int) -> int | None:
    return next((step for step in warned if start <= step < end), None)


def window_rate(run: dict, rule: str, width: int) -> float:
    """Share of all windows of `width` steps of a run, its warm-up left out, that hold a warning of a rule."""
    begin = (RULE["span"] + RULE["warm_up"]) * run["every"]
    starts = range(begin, run["steps"] - width + 1)
    hits = sum(_first(run["warned"][rule], s, s + width) is not None for s in starts)
    return hits / len(starts) if starts else 0.0


def warning_verdict(ramps: list[dict], stable: list[dict]) -> str:
    """What the warnings of each signal were worth, from the numbers."""
    parts = []
    for rule in ramps[0]["warned"]:
        happened = [r for r in ramps if r["instability"] is not None and r["instability"] >= r["ramp"]]
        firsts = [(r, _first(r["warned"][rule], r["ramp"], r["instability"])) for r in happened]
        leads = [r["instability"] - first for r, first in firsts if first is not None]
        alarms = sum(bool(r["warned"][rule]) for r in stable)
        lead = f", by a median of {median(leads):g} steps," if leads else ""
        parts.append(
            f"{rule} warned before {len(leads)} of {len(happened)} instabilities of the loss{lead} "
            f"and in {alarms} of {len(stable)} stable runs"
        )
    return f"**{'; the same rule on '.join(parts)}** (n = {len(ramps)} ramps and {len(stable)} stable runs)."


def _warnings(records: list[dict]) -> list[str]:
    ratios, runs = with_warnings(records)
    stable, ramps = ([r for r in runs if r["run"] == kind] for kind in ("stable", "ramp"))
    rows = []
    for event in ("instability", "error_spike"):
        happened = [r for r in ramps if r[event] is not None and r[event] >= r["ramp"]]
        width = round(median(r[event] - r["ramp"] for r in happened)) if happened else 0
        for rule in runs[0]["warned"]:
            firsts = [(r, _first(r["warned"][rule], r["ramp"], r[event])) for r in happened]
            leads = [r[event] - first for r, first in firsts if first is not None]
            before = sum(any(step < r["ramp"] for step in r["warned"][rule]) for r in ramps)
            chance = fmean(window_rate(r, rule, max(width, 1)) for r in stable) if stable else 0.0
            cells = ["instability of the loss" if event == "instability" else "error spike", rule]
            cells += [f"{len(leads)} of {len(happened)}"]
            cells += [f"{median(leads):g} ({min(leads)} – {max(leads)})" if leads else "–"]
            cells += [f"{sum(bool(r['warned'][rule]) for r in stable)} of {len(stable)}", f"{before} of {len(ramps)}"]
            rows.append([*cells, f"{chance:.0%}" if happened else "–"])
    unstable = [sum(r["instability"] is not None for r in group) for group in (ramps, stable)]
    text = (
        f"The rule of `EarlyWarning` ({', '.join(f'{k} {v:g}' for k, v in RULE.items())}). The ratio of each signal is the "
        f"least at which it warns in none of the stable runs with the tuning seeds ({', '.join(map(str, TUNING_SEEDS))}): "
        f"{', '.join(f'{name} {ratio:.3g}' for name, ratio in ratios.items())}. κ_softmax is that of root-sum-squares, κ_softmax "
        "of v1 the largest of any row, which the published warning (lead 16–24 steps) is of. Ramps multiply the learning rate by "
        f"{RAMP_FACTOR:g} a step from a step on. Instability: a loss {BLOW_UP:g} nats above the best mean of ten "
        f"steps so far; error "
        f"spike: a BF16 mismatch {SPIKE:g} × the median of its past. Warned before: from the start of the ramp to "
        f"the event, in runs "
        "that had it. Chance: share of windows as long as the median wait for the event, in the stable runs, that hold a warning. "
        f"{len(ramps)} ramps (instabilities: {unstable[0]}), {len(stable)} stable runs (instabilities: {unstable[1]}). A "
        "`NormEpsilonController` at its defaults that sees the risks but leaves the model alone: "
        f"{', '.join(str(r['controller_actions']) for r in stable)} actions in the stable runs."
    )
    head = [
        "event",
        "signal",
        "warned before",
        "lead, steps",
        "stable runs with a warning",
        "ramps with one before it",
        "chance",
    ]
    said = warning_verdict(ramps, stable)
    return [
        "## Early warning before planted instabilities",
        "",
        *_paragraph(said),
        *_paragraph(text),
        *_table(head, rows),
    ]


def _cost(records: list[dict]) -> list[str]:
    rows = []
    for r in (r for r in records if r["kind"] == "cost"):
        first, *later = r["probe_seconds"]
        step = (r["seconds"] - sum(r["probe_seconds"])) / r["steps"]
        cells = [r["model"], f"{r['batch']} × {r['length']}", str(r["steps"]), f"{1000 * step:.0f}", str(r["every"])]
        cells += [f"{1000 * first:.0f}", f"{1000 * fmean(later):.0f}" if later else "–"]
        cells += [f"{fmean(later) / (r['every'] * step):.1%}" if later else "–"]
        rows.append([*cells, f"{sum(r['probe_seconds']) / (r['steps'] * step):.1%}"])
    head = ["model", "tokens a step", "steps", "ms a step", "every", "first probe, ms", "later ones, ms"]
    head += ["later ones, of the training time", "all of the run's"]
    text = (
        "In a BF16 `Trainer` run at the default cadence, one sequence a probe. The first probe also finds the weights' singular "
        "vectors; in a run this short it counts for more than in a real one."
    )
    return ["## Cost of `FragilityCallback`", "", *_paragraph(text), *_table(head, rows)]


def to_markdown(host: dict, records: list[dict]) -> str:
    """The page."""
    parts = [r for r in records if r["kind"] == "part"]
    commits = ", ".join(sorted({r["commit"] for r in parts}))
    text = (
        f"Generated by `{host['command']}`: {host['device']}, driver {host['driver']}, torch {host['torch']}, transformers "
        f"{host['transformers']}, triton {host['triton']}, commit {commits}, {sum(r['seconds'] for r in parts):.0f} s. "
        "Formulas, and what of them comes from summaries: "
        "[fragility_method.md](fragility_method.md). The GPT-2 was trained here, on bytes of Python's manual; "
        "SmolLM2-135M-Instruct, "
        "where it appears, was fine-tuned on the same text. One held-out sequence a measurement."
    )
    lines = _paragraph(text)
    for section in (_layers, _lengths, _series, _warnings, _cost):
        lines += section(records)
    return "\n".join(lines).rstrip() + "\n"


def plot(records: list[dict], path: Path) -> None:
    """Measured mismatch against risk layer by layer, and one ramp's κ_softmax, error and loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    mine = [r for r in records if r["kind"] == "layers" and r["precision"] == "float8_e4m3"]
    longest = {r["model"]: r for r in mine}  # the last setting of each model
    for color, (model, r) in enumerate(longest.items()):
        label = f"{model}, step {r['step']}, length {r['length']}"
        left.scatter(r["scores"][OURS], r["measured"], color=f"C{color}", label=label, s=18)
    left.set(
        xscale="log", yscale="log", xlabel="risk of the layer", ylabel="mismatch with FP8 attention in this layer alone"
    )
    left.legend(fontsize=8)
    run = next((r for r in with_warnings(records)[1] if r["run"] == "ramp"), None)
    if run:
        right.plot(run["observed"], run["signals"]["κ_softmax"], label="κ_softmax")
        right.plot(run["observed"], [1e3 * e for e in run["errors"]], label="BF16 mismatch × 1000")
        right.plot(range(len(run["losses"])), run["losses"], label="loss, nats", color="0.6")
        right.axvline(run["ramp"], color="0.8", linestyle="--", label="the ramp begins")
        for step in run["warned"]["κ_softmax"][:1]:
            right.axvline(step, color="C3", label="first warning")
        right.set(yscale="log", xlabel="optimizer step", title=f"a ramp, seed {run['seed']}")
        right.legend(fontsize=8)
    figure.savefig(path, dpi=140)
