"""Published benchmark tables are what their scripts make of the recorded measurements."""

import json
import re
import statistics
from pathlib import Path

import pytest

from hf_geoscale.cli.transients_report import to_markdown

ROOT = Path(__file__).parent.parent
SDPA = ("SDPA", "SDPA cuDNN", "SDPA flash")


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "docs" / name).read_text().splitlines()]


def test_the_goals_quoted_in_the_documentation_are_those_of_the_records():
    rows = [r for r in read_lines("attention_speed.jsonl") if "environment" not in r]

    def found(model: str, length: int, name: str) -> dict:
        return next(r for r in rows if (r["model"], r["length"], r["name"]) == (model, length, name))

    def ratio(model: str, length: int, rival: str = "SDPA cuDNN BF16") -> str:
        times = [found(model, length, name)["ms"]["whole both"][1] for name in (rival, "hf_geoscale FP8")]
        return f"{times[0] / times[1]:.2f}"

    ours = found("Llama-3-8B", 16384, "hf_geoscale FP8")
    speeds = [
        f"{share * ours['forward_flops'] / ours['ms'][basis][1] / 1e9:.0f}"
        for share, basis in ((1, "kernel forward"), (2.5, "kernel backward"))
    ]
    text = (ROOT / "docs" / "kernels.md").read_text()
    table = text[text.index("| goal | wanted | measured |") :].split("\n\n")[0]
    quoted = [re.match(r"[\d.]+", line.split("|")[3].strip())[0] for line in table.splitlines()[2:]]
    ratios = [ratio(m, n) for m in ("Llama-3-8B", "Llama-3.2-1B") for n in (16384, 4096)]
    assert quoted == [*ratios, ratio("Llama-3-8B", 16384, "cuDNN FP8"), *speeds]
    assert f"but {ratio('Llama-3-8B', 16384, 'cuDNN FP8, idle window')} against" in table
    grouped = [float(ratio(m, n)) for m in ("Llama-3-8B", "Llama-3.2-1B") for n in (4096, 16384, 32768)]
    alone = [float(ratio("GPT-2 XL", n)) for n in (4096, 16384, 32768)]
    speed = f"{min(grouped):.2f} to {max(grouped):.2f} × on one H100 from 4,096 tokens on with grouped"
    assert speed in readme()
    assert f"{min(alone):.2f} to {max(alone):.2f} × without grouping" in readme()
    took = [
        found("Llama-3-8B", n, name)["ms"]["whole both"][1]
        for n, name in (
            *((16384, "cuDNN FP8"), (16384, "cuDNN FP8, idle window"), (32768, "cuDNN FP8")),
            *((32768, "cuDNN FP8, idle window"), (32768, "hf_geoscale FP8")),
        )
    ]
    words = " ".join(text.split())
    short = [
        f"{found(m, 1024, 'SDPA cuDNN BF16')['ms']['whole both'][1] / found(m, 1024, name)['ms']['whole both'][1]:.2f}"
        for m in ("Llama-3-8B", "Llama-3.2-1B", "GPT-2 XL")
        for name in ("hf_geoscale FP8", "hf_geoscale FP8, autograd")
    ]
    said = "at {0} and {2}, through autograd at {1} and {3}; GPT-2 XL's at {4} and {5}, 0.40 then"
    assert said.format(*short) in words
    both = {
        (r["model"], r["length"], r["name"]): r["ms"]["whole both"][1]
        for r in rows
        if r["length"] >= 4096 and "whole both" in r["ms"]
    }
    high = {(m, n): ms for (m, n, name), ms in both.items() if name == "hf_geoscale FP8, high"}
    dearer = [ms / both[(*place, "hf_geoscale FP8")] for place, ms in high.items()]
    faster = [
        both[(*place, "SDPA cuDNN BF16")] / ms for place, ms in high.items() if (*place, "SDPA cuDNN BF16") in both
    ]
    assert f"{min(dearer):.2f} to {max(dearer):.2f} times standard from 4,096 tokens on" in words
    assert f"{min(faster):.2f} to {max(faster):.2f} × SDPA cuDNN BF16" in words
    for said in (
        *(
            "take {:.1f} ms at 16,384",
            '{1:.1f} ms (the rows "idle window")',
            "{2:.1f} and {3:.1f} ms, against our {4:.1f}",
        ),
        "attention is about {4:.1f} ms",
    ):
        assert said.format(*took) in words


@pytest.mark.parametrize("name", ["transients", "transients_loading"])
def test_the_transients_are_rendered_from_their_records(name):
    host, *records = read_lines(f"{name}.jsonl")
    assert to_markdown(host, records).strip() == (ROOT / "docs" / f"{name}.md").read_text().strip()


def test_figures_quoted_from_records():
    """What README.md, config.py and docs/ say of families, accuracy and transients is what the generated pages hold."""
    readme, numerics = (ROOT / name for name in ("README.md", "docs/numerics.md"))
    native, families = re.search(r"(\d+) families, (\d+) native", (ROOT / "docs/families.md").read_text()).groups()[
        ::-1
    ]
    assert f"{native} of the {families} decoder families" in readme.read_text()
    host, *records = map(json.loads, (ROOT / "docs/transients_loading.jsonl").read_text().splitlines())
    lost = {
        (scenario, strategy): sum(
            record["overflows"].get("logit", 0)
            for record in records
            if record["event"] and (record["scenario"], record["strategy"]) == (scenario, strategy)
        )
        for scenario, strategy in (("fresh", "rank-aware"), ("other", "auto-alpha"), ("fresh", "geometry"))
    }
    assert f"{lost['fresh', 'rank-aware']:,} logits in three calls" in numerics.read_text().replace("\n", " ")
    assert f"{lost['other', 'auto-alpha'] / 1e6:.0f} million" in numerics.read_text()
    assert lost["fresh", "geometry"] == 0
    assert f"{host['batch_size'] * host['length']:,} tokens a call" in numerics.read_text()
    rows = [json.loads(line) for line in (ROOT / "docs/accuracy.jsonl").read_text().splitlines()]
    kl = {(r["task"], r["mode"]): r["kl"] for r in rows if r.get("phase") == "before" and "task" in r}
    ratios = [kl[task, "high"] / kl[task, "operands"] for task, mode in kl if mode == "high"]
    assert f"{sum(ratios) / len(ratios):.1f} of the KL divergence" in (ROOT / "hf_geoscale/config.py").read_text()
    losses = (ROOT / "docs/training_losses.md").read_text()
    mean, spread = map(float, re.search(r"mean ([-+.\d]+), standard deviation ([.\d]+)", losses).groups())
    trained = [float(x) for x in re.findall(r"\| (?:BF16|FP8) \(\w+\) \| ([.\d]+)", losses)]
    gaps = {round(fp8 - bf16, 3) for bf16, fp8 in zip(trained[::2], trained[1::2], strict=True)}
    kernels = (ROOT / "docs/kernels.md").read_text()
    assert f"ends {-mean:.3f} ± {spread:.3f} below BF16".replace(" 0.", " .") in kernels
    assert gaps == {0.024}
    assert "it stays .024 above it, at every seed" in kernels


def test_whole_steps_quoted_are_those_of_the_records():
    """Figures of docs/step.jsonl in README.md and docs/kernels.md, against the better SDPA of the same configuration."""
    medians: dict[tuple, dict[str, float]] = {}
    runs: dict[str, dict[str, float]] = {}  # of the configuration that scatters, by commit
    peaks: dict[tuple, dict[str, float]] = {}
    for row in read_lines("step.jsonl"):
        place, times = (row["model"], row["length"], row["setting"]), row["times"]
        if times is None:
            continue
        medians.setdefault(place, {})[row["contender"]] = statistics.median(times["step"])
        if place == ("Llama-3.2-1B", 2048, "plain"):
            runs.setdefault(row["environment"]["commit"], {})[row["contender"]] = statistics.median(times["step"])
        peaks.setdefault(place, {})[row["contender"]] = times["peak_bytes"]

    def ratio(model: str, length: int, setting: str = "plain") -> str:
        found = medians[model, length, setting]
        rival = min(ms for name, ms in found.items() if name in SDPA)
        return f"{rival / found['hf_geoscale']:.2f}"

    lengths = (8192, 16384, 32768)
    plain, checkpointed = ([ratio("Llama-3-8B", n, s) for n in lengths] for s in ("plain", "checkpointing"))
    small = [ratio("Llama-3-8B", 2048), ratio("Llama-3.2-1B", 2048), ratio("Llama-3.2-1B", 8192)]
    readme, kernels = ((ROOT / name).read_text().replace("\n", " ") for name in ("README.md", "docs/kernels.md"))
    assert f"is {plain[0]}, {plain[1]} and {plain[2]} times" in readme
    assert f"and {small[0]} at 2,048" in readme
    assert f"2,048 tokens {small[1]}" in readme
    scatter = [min(ms for c, ms in run.items() if c in SDPA) / run["hf_geoscale"] for run in runs.values()]
    assert "the three runs in the records gave {:.2f}, {:.2f} and {:.2f}.".format(*scatter) in kernels
    assert f"Compiled, 8 layers at 8,192 tokens: {ratio('Llama-3-8B', 8192, 'compile')}" in kernels
    pairs = [f"{a} | {b}" for a, b in zip(plain, checkpointed, strict=True)]
    assert f"{pairs[0]} at 8,192 tokens, {pairs[1]} at 16,384, {pairs[2]} at 32,768" in kernels
    assert (
        f"{small[0]} at 2,048. Llama-3.2-1B layers: {small[2]} at 8,192 (wanted 1.10), {small[1]} at 2,048" in kernels
    )
    ligers = [found["Liger + SDPA cuDNN"] for found in medians.values() if "Liger + SDPA cuDNN" in found]
    plains = [found["SDPA cuDNN"] for found in medians.values() if "Liger + SDPA cuDNN" in found]
    gains = [f"{plain / liger:.2f}" for plain, liger in zip(plains, ligers, strict=True)]
    assert f"Liger-Kernel with SDPA is {min(gains)} to {max(gains)} times as fast" in kernels
    less = [100 * (1 - found["hf_geoscale"] / found["SDPA cuDNN"]) for found in peaks.values()]
    assert f"(Mistral {sorted(less)[-1]:.1f}, the others up to {sorted(less)[-2]:.1f})" in kernels
    assert f"Peak memory is {abs(min(less)):.1f} to {max(less):.1f} % below SDPA cuDNN's" in kernels
    assert min(less) > -1e-4


def readme() -> str:
    return " ".join((ROOT / "README.md").read_text().split())


def test_the_adapters_quoted_are_those_of_their_page():
    page = (ROOT / "docs/adapters.md").read_text()
    found = re.findall(
        r"LoRA, FP8 − BF16: held-out gap ([-+.\d]+) ± .*? both under SDPA, ([-+.\d]+) ±"
        r".*? both under FP8, ([-+.\d]+) ±.* spreads by ([.\d]+)",
        page,
    )
    own, sdpa, fp8, spreads = zip(*([float(x) for x in row] for row in found), strict=True)
    said = (
        "end {:.4f} and {:.4f} nats from BF16's when both are evaluated under SDPA, and {:.4f} and {:.4f} when both are evaluated "
        "under FP8 attention, within the spread of BF16's seeds"
    )
    assert said.format(*map(abs, sdpa + fp8)) in readme()
    assert all(abs(gap) <= spread for gap, spread in zip(sdpa + fp8, spreads + spreads, strict=True))
    assert "under FP8 they end {:.4f} and {:.4f} above BF16's under SDPA".format(*own) in readme()


def test_steps_with_fp8_linears_quoted_are_those_of_their_pages():
    def milliseconds(page: str, linears: str) -> list[str]:
        rows = (line.split(" | ") for line in (ROOT / page).read_text().splitlines() if line.startswith(f"| {linears}"))
        return [row[2].split()[0] for row in rows]

    engine = milliseconds("docs/training_linears.md", "FP8 (Transformer Engine)")
    assert "takes {} ms under SDPA, {} under its own FP8 attention and {} under ours;".format(*engine) in readme()
    compiled = milliseconds("docs/training_linears_compile.md", "FP8 (torchao)")
    assert "those of torchao, compiled, {} under SDPA and {} under ours".format(*compiled) in readme()


def test_no_row_of_the_matrix_fails():
    assert "**fails**" not in (ROOT / "docs/feature_matrix.md").read_text()
    assert "[docs/feature_matrix.md](docs/feature_matrix.md); no row of it fails." in readme()


def test_what_a_step_spends_is_what_was_profiled():
    """Figures of docs/step_profile.txt, three layers, in docs/kernels.md."""
    kernels = " ".join((ROOT / "docs/kernels.md").read_text().split())
    _, sdpa, ours = (ROOT / "docs/step_profile.txt").read_text().split("## ")
    step, joules, watts = zip(
        *(map(float, re.findall(r": ([\d.]+) ms/step ([\d.]+) J (\d+) W", part)[0]) for part in (sdpa, ours)),
        strict=True,
    )

    def layer(part: str, names: str) -> float:
        rows = re.findall(r"^ *([\d.]+) ms +[\d.]+ (.*)$", part, re.MULTILINE)
        return sum(float(ms) for ms, name in rows if re.match(names, name)) / 3

    parts = [layer(ours, name) for name in ("key_gradient_kernel", "forward_kernel", "query_product_kernel")]
    rest = layer(ours, "quantize_kernel|quantize_gradient_kernel|transpose_kernel|gradient_range_kernel")
    said = f"dK and dV {parts[0]:.1f}, forward {parts[1]:.1f}, dQ {parts[2]:.1f}, quantising and δ {rest:.1f}"
    assert f"and {sum(parts) + rest:.1f} in the step" in kernels
    assert f"{said}), SDPA's {layer(sdpa, '.*cudnn'):.0f}." in kernels
    assert f"run at {min(watts):.0f} W from end to end" in kernels
    assert f"step takes {joules[0]:.0f} J under SDPA and {joules[1]:.0f} under ours" in kernels
    assert f"Of the {watts[1] * (sum(parts) + rest) / 1e3:.0f} J of our attention in a layer" in kernels
    added = re.search(r"([\d.]+) ms +21.0 .*CUDAFunctor_add<c10::BFloat16>", ours)[1]
    assert f"in two passes: {2 * float(added) / 21:.1f} of {step[1] / 3:.0f} ms of a layer" in kernels


def test_costs_quoted_are_those_of_their_records():
    """What docs/kernels.md, README.md and CHANGELOG.md say of Liger, the refresh, the norms and the longest sequences."""
    rows = {(r["model"], r["length"], r["contender"]): r for r in read_lines("step.jsonl") if r["setting"] == "plain"}

    def median(model: str, length: int, contender: str, what: str = "step") -> float:
        return statistics.median(rows[model, length, contender]["times"][what])

    def ratio(model: str, length: int) -> str:
        return f"{median(model, length, 'SDPA cuDNN') / median(model, length, 'Liger + hf_geoscale'):.2f}"

    kernels = " ".join((ROOT / "docs/kernels.md").read_text().split())
    large, small = ratio("Llama-3-8B", 8192), ratio("Llama-3.2-1B", 2048)
    assert (
        f"together they are {large} at 8,192 tokens of Llama-3-8B layers and {small} at 2,048 of Llama-3.2-1B"
        in readme()
    )
    assert f"attention it is {large} times as fast at 8,192 tokens" in kernels
    ours = [(m, n) for m, n, contender in rows if contender == "hf_geoscale"]
    shares = [100 * median(m, n, "hf_geoscale", "refresh") / median(m, n, "hf_geoscale") for m, n in ours]
    assert f"takes {min(shares):.2f} to {max(shares):.2f} % of a step" in kernels
    long = [median("Llama-3-8B", 32768, c) for c in ("SDPA cuDNN", "Liger + SDPA cuDNN", "Liger + hf_geoscale")]
    said = "and {:.2f} times at 32,768, {:.2f} times as fast as Liger-Kernel with SDPA"
    assert said.format(long[0] / long[2], long[1] / long[2]) in kernels
    exact = median("Llama-3-8B", 8192, "SDPA cuDNN") / median("Llama-3-8B", 8192, "hf_geoscale")
    assert f"which without is {exact:.4f}" in kernels
    window = median("Mistral-7B", 16384, "SDPA cuDNN") / median("Mistral-7B", 16384, "hf_geoscale")
    assert f"4,096 at 16,384 tokens: {window:.2f}" in kernels
    peak, *sdpa = [
        rows["Llama-3-8B", 2048, c]["times"]["peak_bytes"] / 1e6 for c in ("hf_geoscale", "SDPA cuDNN", "SDPA flash")
    ]
    assert "{:.3f} MB above cuDNN's and {:.3f} MB above flash's".format(*(peak - x for x in sdpa)) in kernels
    layers = [
        median("Llama-3-8B", 32768, c) / rows["Llama-3-8B", 32768, c]["layers"] for c in ("SDPA cuDNN", "hf_geoscale")
    ]
    assert "takes {:.1f} ms under SDPA and {:.1f} under ours".format(*layers) in kernels
    assert f"1.28 would be {layers[0] / 1.28:.1f} ms" in kernels
    first = rows["Llama-3.2-1B", 8192, "Liger + hf_geoscale"]["first_steps"]
    off = [100 * (first[c]["norm"] / first["SDPA cuDNN"]["norm"] - 1) for c in ("Liger + hf_geoscale", "hf_geoscale")]
    said = f"by {off[0]:.3f} %, where the gate allows {100 * first['allowed']['norm']:.3f} ({off[1]:.3f} under our attention alone)"
    assert said in kernels
    page = (ROOT / "docs/qk_norm_cost.md").read_text()
    inside, alone = re.search(r"\| 8,192 \| in the kernels \| \S+ / (\S+) / \S+ \| \d+ \| \S+ / (\S+) /", page).groups()
    outside = re.search(r"\| 8,192 \| modules \| \S+ / (\S+) /", page)[1]
    assert (
        f"takes {float(inside):.2f} ms forward and backward there, and {float(outside):.2f} with its norms as modules"
        in kernels
    )
    assert f"{float(alone):.2f} ms at 8,192 tokens" in kernels
    refresh = re.search(
        r"Llama-3-8B \| bfloat16 \|[^|]*\|[^|]*\| ([\d.]+) \[[^|]*\| ([\d.]+) \[",
        (ROOT / "docs/refresh_cost.md").read_text(),
    )
    assert f"{refresh[1]} ms on the device, {float(refresh[2]):.1f} on the host" in (ROOT / "CHANGELOG.md").read_text()
