"""Generated parts of docs/sums.md, and its figure, from the JSON lines of benchmarks/sums.py."""

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
END = "<!-- /generated -->"

Record = dict[str, Any]

IMPLEMENTATIONS = {
    "hf_geoscale FP8": "tab:green",
    "hf_geoscale FP8, before": "tab:olive",
    "hf_geoscale FP8, high": "tab:cyan",
    "hf_geoscale FP8, portable": "tab:purple",
    "specification": "black",
    "specification, high": "tab:gray",
    "FlashAttention-3 FP8": "tab:red",
    "cuDNN FP8": "tab:orange",
    "SDPA BF16": "tab:blue",
}
"""Names in the tables, in order, and colours in every panel of the figure."""

SPECIFICATION = {"hf_geoscale FP8, high": "specification, high"}
"""Which specification an implementation is held to; "specification" for the others."""

PLOTTED = ("hf_geoscale FP8", "hf_geoscale FP8, before", "FlashAttention-3 FP8", "cuDNN FP8", "SDPA BF16")
PANELS = (("uniform", "last"), ("+mean", "dQ"), ("+mean", "dK"), ("+mean", "dV"))
PLOTTED_DIM = 128

WORDS = {"O": "O", "last": "O, last 512 rows", "dQ": "dQ", "dK": "dK", "dV": "dV"}
FORMS = {"causal": "causal", "window": "window", "packed": "packed documents", "padded": "left padding"}
LIKE_TERMS = (32, 64, 128, 256, 512, 8192)
"""Products that share an accumulator, in the table of the bound."""


def name_of(record: Record) -> str:
    return record["implementation"] + ("" if record["label"] == "now" else f", {record['label']}")


def latest(records: list[Record]) -> dict[tuple, Record]:
    """By (name, case, form, dim, length): the last record of each, any seed."""
    return {(name_of(r), *(r[x] for x in ("case", "form", "dim", "length"))): r for r in records}


def number(x: float | None) -> str:
    """Three decimals below .1, two below 1, two significant figures above."""
    if x is None:
        return "–"
    return (f"{x:.3f}" if x < 0.0995 else f"{x:.2f}" if x < 0.995 else f"{x:.2g}").removeprefix("0")


def provenance(records: list[Record]) -> str:
    """What the records ran on: a sentence for each label and machine."""
    hosts = {}
    for record in records:
        hosts[(record["label"], *record["environment"].items())] = record["environment"]
    lines = []
    for (label, *_), host in hosts.items():
        what = ", ".join(f"{key} {value}" for key, value in host.items() if value != "none")
        lines.append(f'- records "{label}": {what}.')
    return "\n".join(lines)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _order(found: dict[tuple, Record], place: int) -> list[Any]:
    return list(dict.fromkeys(k[place] for k in found))


def of_causal(found: dict[tuple, Record], dim: int, quantities: tuple[str, ...]) -> list[str]:
    """Cases and lengths down, implementations across; the quantities stand in one cell."""
    here = {k: r for k, r in found.items() if k[2:4] == ("causal", dim)}
    names = [name for name in IMPLEMENTATIONS if any(k[0] == name for k in here)]
    rows = []
    for case in _order(here, 1):
        for length in sorted({k[4] for k in here if k[1] == case}):
            cells = []
            for name in names:
                record = here.get((name, case, "causal", dim, length))
                cells.append(" ".join(number(record[x]) for x in quantities) if record else "–")
            rows.append([f"{case} {length:,}", *cells])
    return table(["case, tokens", *names], rows)


def ratio(record: Record, specified: Record | None, quantity: str) -> float | None:
    if specified is None or record[quantity] is None:
        return None
    return record[quantity] / specified[quantity]


def in_short(found: dict[tuple, Record]) -> list[str]:
    """Ours over all lengths and forms: the largest errors of O and dV, and the largest ratios to the specification."""
    rows = []
    ours = [name for name in IMPLEMENTATIONS if name.startswith("hf_geoscale")]
    for name in ours:
        for case in _order(found, 1):
            mine = [(k, r) for k, r in found.items() if k[:2] == (name, case)]
            if not mine:
                continue
            against = [found.get((SPECIFICATION.get(name, "specification"), *k[1:])) for k, _ in mine]
            cells = [number(max(r[x] for _, r in mine)) for x in ("O", "last", "dV")]
            for quantity in ("O", "dQ", "dK", "dV"):
                pairs = zip(mine, against, strict=True)
                ratios = [x for (_, r), other in pairs if (x := ratio(r, other, quantity)) is not None]
                cells.append(f"{max(ratios):.2f}" if ratios else "–")
            rows.append([name, case, str(len(mine)), *cells])
    header = ["implementation", "case", "problems", "O", "O, last 512 rows", "dV"]
    return table([*header, *(f"{x}, ratio" for x in ("O", "dQ", "dK", "dV"))], rows)


def of_forms(found: dict[tuple, Record]) -> list[str]:
    """Other forms at their longest: ours / the specification."""
    rows = []
    for form, words in FORMS.items():
        here = {k: r for k, r in found.items() if k[2] == form}
        if form == "causal" or not here:
            continue
        longest = max(k[4] for k in here)
        for case in _order(here, 1):
            for dim in sorted(_order(here, 3)):
                pair = [here.get((name, case, form, dim, longest)) for name in ("hf_geoscale FP8", "specification")]
                if None not in pair:
                    cells = [" / ".join(number(r[x]) for r in pair) for x in WORDS]
                    rows.append([words, case, str(dim), f"{longest:,}", *cells])
    return table(["form", "case", "D", "tokens", *WORDS.values()], rows)


def records_part(records: list[Record]) -> str:
    if not records:
        return "No records."
    found = latest(records)
    dims = sorted({k[3] for k in found}, reverse=True)
    lines = [
        "![error against length](sums.png)",
        "",
        "Relative errors against float64. Generated by `python benchmarks/sums.py --report docs/sums.jsonl`.",
        "",
        "**In short.** The largest errors over all lengths, forms and head dimensions of the records, and the largest",
        "ratios to the errors of the specification on the same input.",
        "",
        *in_short(found),
    ]
    for dim in dims:
        lines += [f"**Outputs, D {dim}, causal.** O of all rows, then of the last 512.", ""]
        lines += of_causal(found, dim, ("O", "last"))
        lines += [f"**Gradients, D {dim}, causal.** dQ, dK, dV.", ""]
        lines += of_causal(found, dim, ("dQ", "dK", "dV"))
    lines += ["**Other forms.** hf_geoscale FP8 / the specification.", "", *of_forms(found)]
    return "\n".join([*lines, "**Provenance.**", "", provenance(records)])


def bound_part() -> str:
    """c, the mean bias, and the model's own loss on like terms, by products that share an accumulator."""
    sys.path.append(str(ROOT))
    from tests.kernels.accumulator import WIDTH, fp8_matmul, mean_bias, sum_bound

    rows = []
    for shared in LIKE_TERMS:
        generator = torch.Generator().manual_seed(shared)
        p8 = (256 * (0.5 + 0.5 * torch.rand(64, shared, generator=generator))).to(torch.float8_e4m3fn)
        v8 = (25 + 7.5 * torch.randn(shared, 64, generator=generator)).to(torch.float8_e4m3fn)
        terms = p8.double()[:, None] * v8.double().T[None]
        exact = terms.sum(-1)
        spread = float(terms.unflatten(-1, (-1, WIDTH)).amax(-1).mean() / terms.mean())
        lost = float(((exact - fp8_matmul(p8, v8, None)) / exact).mean())
        rows.append(
            [f"{shared:,}", *(f"{x:.2g}" for x in (sum_bound(shared, None), mean_bias(shared, None, spread), lost))]
        )
    text = "In the model: P̃8 between 128 and 256, values of 25 ± 7.5, as where rows attend nearly evenly over values with a mean."
    header = ["products in one accumulator", "c, for every input", "bias of like terms, at most", "in the model"]
    return "\n".join([*table(header, rows), text])


def replaced(page: str, part: str, text: str) -> str:
    """A page with new text between the markers of a part. Raises ValueError where they are missing."""
    start = f"<!-- generated: {part} -->\n"
    before, found, rest = page.partition(start)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"the page has no markers of the part {part!r}")
    return f"{before}{start}{text}\n{END}{after}"


def write(records: list[Record], path: Path) -> None:
    """The page beside the records, between its markers, and the figure."""
    page = path.with_suffix(".md")
    text = replaced(page.read_text(), "records", records_part(records))
    page.write_text(replaced(text, "bound", bound_part()))
    plot(records, path.with_suffix(".png"))


def plot(records: list[Record], path: Path) -> None:
    """Error against length, a panel for each of PANELS, D 128, causal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = latest(records)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.6), squeeze=False)
    for axis, (case, quantity) in zip(axes[0], PANELS, strict=True):
        for name in PLOTTED:
            here = [
                r for k, r in found.items() if k[:4] == (name, case, "causal", PLOTTED_DIM) and r[quantity] is not None
            ]
            points = sorted((r["length"], r[quantity]) for r in here)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=IMPLEMENTATIONS[name], label=name)
        axis.set(title=f"{case}: {WORDS[quantity]}", yscale="log", xlabel="tokens")
        lengths = sorted({k[4] for k in found if k[1:4] == (case, "causal", PLOTTED_DIM)})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
    axes[0][0].set_ylabel("relative error")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0][0].legend(handles.values(), handles.keys(), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
