"""LoRA and QLoRA fine-tuning with FP8 attention against BF16 (SDPA): held-out losses, gap and spread over seeds.

    python benchmarks/adapters.py .model/SmolLM2-135M-Instruct --output docs/adapters.md

Rows are written as they come; a call with the same --output adds what is missing, so that --methods and --seeds may share the work.
Each seed sets the adapters' initial values, their dropout and the order of the data; every attention starts from the same adapters.
The held-out loss is taken under the attention that trained and, of the same adapters, under SDPA and under FP8: the last two, each
compared across rows, are of training alone.
BF16 autocast over a BF16 base (QLoRA: NF4 with double quantisation, bitsandbytes) with float32 adapters on q, k, v and o; AdamW;
scales are refreshed after every step. On a CPU, scale down: --steps 2 --length 32 --batch 1 --held-out 1.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import peft
import torch
from host import environment
from records import append, read
from torch import Tensor, nn

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.cli.loading import load, read_text, token_blocks

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, DROPOUT = 16, 32, 0.05
BF16 = "BF16 (SDPA)"
PRECISIONS = {BF16: None, "FP8": "standard", 'FP8, precision="high"': "high"}
"""Attentions compared, and the precision that `patch_model` gets."""
LAST_THIRD, OWN = "mean loss, last third", "held out"
UNDER_SDPA, UNDER_FP8 = "held out, under SDPA", "held out, under FP8"
COLUMNS = ("adapters", "seed", "attention", LAST_THIRD, OWN, UNDER_SDPA, UNDER_FP8, "overflows")

HISTORY = """\
The page at commit 81bdab3 had 40 steps, and each attention's own forward alone. The steps, the column "under SDPA" and
precision="high" came after it had been seen, and the column "under FP8" (precision="standard") after the page of 60 steps at
91036ca."""


def four_bit(linear: nn.Linear) -> nn.Module:
    """The layer in NF4 with double quantisation, still to be moved to its device."""
    import bitsandbytes

    new = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4"
    )
    new.load_state_dict(linear.state_dict())
    return new


def build(folder: str, method: str, seed: int, device: str) -> Any:
    """A fresh PEFT model, "LoRA" on a BF16 base or "QLoRA" on an NF4 one."""
    model: Any = load(folder)[0].to(torch.bfloat16)
    if method == "QLoRA":
        inner = model.get_decoder()
        linears = [(name, m) for name, m in inner.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears:
            inner.set_submodule(name, four_bit(linear))
        model.is_loaded_in_4bit = True
    model = model.to(device)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor) -> float:
    model.eval()
    losses = [float(loss_of(model, row[None])) for row in ids]
    model.train()
    return statistics.fmean(losses)


def train(model: Any, ids: Tensor, seed: int, arguments: argparse.Namespace) -> list[float]:
    """Losses of every step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.learning_rate)
    losses = []
    for _ in range(arguments.steps):
        rows = torch.randint(len(ids), (arguments.batch,), generator=generator)
        loss = loss_of(model, ids[rows.to(ids.device)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(x) for x in losses]


def refuse_fallbacks(model: Any) -> list[dict]:
    """Rows of the report. Raises RuntimeError where a layer ran on SDPA."""
    layers = geometry_report(model).rows
    if any(layer["fallback_calls"] for layer in layers):
        raise RuntimeError("some attention ran on SDPA; the comparison would not be of FP8")
    return layers


def compare(method: str, seed: int, training: Tensor, held_out: Tensor, arguments: argparse.Namespace) -> list[dict]:
    """All attentions from the same adapters: a row each."""
    model = build(arguments.model, method, seed, training.device.type)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for attention, precision in PRECISIONS.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        if precision is not None:
            patch_model(model, precision=precision)
        losses = train(model, training, seed, arguments)
        row: dict[str, Any] = {"adapters": method, "seed": seed, "attention": attention}
        row[LAST_THIRD] = statistics.fmean(losses[-max(1, len(losses) // 3) :])
        row[OWN] = held_out_loss(model, held_out)
        row["overflows"] = None
        if precision is not None:
            row["overflows"] = sum(layer["overflows"] for layer in refuse_fallbacks(model))
            unpatch_model(model)
        row[UNDER_SDPA] = held_out_loss(model, held_out)
        patch_model(model)
        row[UNDER_FP8] = held_out_loss(model, held_out)
        refuse_fallbacks(model)
        unpatch_model(model)
        rows.append(row)
    return rows


def summary(method: str, attention: str, rows: list[dict]) -> str:
    """Gaps of the held-out losses to BF16's, and the spreads that they are to be judged by."""
    baseline = [row[OWN] for row in rows if row["attention"] == BF16]
    said = []
    for column in (OWN, UNDER_SDPA, UNDER_FP8):
        ours, others = ([row[column] for row in rows if row["attention"] == name] for name in (attention, BF16))
        gaps = [a - b for a, b in zip(ours, others, strict=True)]
        spread = f" ± {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
        said.append(f"{statistics.fmean(gaps):+.4f}{spread}")
    itself = f"BF16 itself spreads by {statistics.stdev(baseline):.4f}" if len(baseline) > 1 else "one seed, no spread"
    return (
        f"{method}, {attention} − BF16: held-out gap {said[0]} nats; of what was trained, both under SDPA, {said[1]}, "
        f"both under FP8, {said[2]} (mean ± standard deviation over {len(baseline)} paired seeds; {itself})."
    )


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 100 else f"{value:,.0f}"
    return "–" if value is None else str(value)


def to_markdown(rows: list[dict]) -> str:
    """The page of rows that share their settings, in order of method and seed."""
    rows = sorted(rows, key=lambda row: (row["adapters"], row["seed"]))
    said = rows[0]["settings"]
    lines = [
        f"Generated by `python benchmarks/adapters.py`: {said['model']}, {said['steps']} steps of",
        f"{said['batch']} × {said['length']} tokens, learning rate {said['learning_rate']:g}, rank {RANK}, dropout {DROPOUT}.",
        f"{said['gpu']}, torch {said['torch']}, transformers {said['transformers']}, peft {said['peft']},",
        f"commit {said['commit']}. Nats per token.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cell(row[name]) for name in COLUMNS)} |" for row in rows),
        "",
    ]
    for method in dict.fromkeys(row["adapters"] for row in rows):  # paired by seed
        mine = [row for row in rows if row["adapters"] == method]
        lines += [f"- {summary(method, attention, mine)}" for attention in PRECISIONS if attention != BF16]
    return "\n".join([*lines, "", HISTORY]) + "\n"


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rows of one page share."""
    found = environment("transformers", "peft")
    here = {name: found[name] for name in ("gpu", "torch", "transformers", "peft", "commit")}
    named = {
        name: getattr(arguments, name) for name in ("steps", "batch", "length", "learning_rate", "held_out", "text")
    }
    return {"model": Path(arguments.model).name, **named, **here}


def earlier_rows(path: Path | None, said: dict[str, Any]) -> list[dict]:
    """Rows of earlier calls. Raises ValueError where those have other settings."""
    rows = read(path) if path and path.exists() else []
    other = sorted({name for row in rows for name in said if row["settings"][name] != said[name]})
    if other:
        raise ValueError(f"{path} has rows with another {', '.join(other)}; give another --output, or remove it")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--methods", nargs="+", default=["LoRA", "QLoRA"], choices=["LoRA", "QLoRA"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=8, help="sequences")
    parser.add_argument("--text", help="file to train on; default: the manual that ships with Python")
    parser.add_argument(
        "--output", type=Path, help="Markdown file, with its rows in .jsonl beside it; default: print only"
    )
    arguments = parser.parse_args(argv)
    device, said = "cuda" if torch.cuda.is_available() else "cpu", settings(arguments)
    path = arguments.output and arguments.output.with_suffix(".jsonl")
    done = {(row["adapters"], row["seed"]) for row in earlier_rows(path, said)}
    _, tokenizer = load(arguments.model)
    text = read_text(arguments.text)
    count = len(tokenizer(text, verbose=False).input_ids) // arguments.length
    ids = token_blocks(tokenizer, text, arguments.length, count).to(device)
    training, held_out = ids[: -arguments.held_out], ids[-arguments.held_out :]
    rows: list[dict] = []
    for method, seed in itertools.product(arguments.methods, arguments.seeds):
        if (method, seed) in done:
            continue
        new = [row | {"settings": said} for row in compare(method, seed, training, held_out, arguments)]
        print(*(f"| {' | '.join(cell(row[name]) for name in COLUMNS)} |" for row in new), sep="\n", flush=True)
        rows += new
        if path:
            append(path, new)
    table = to_markdown(earlier_rows(path, said) if path else rows)
    print(table)
    if arguments.output:
        arguments.output.write_text(table)


if __name__ == "__main__":
    main()
