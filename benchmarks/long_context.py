"""SmolLM2-135M at its full 8,192 tokens: KL by position and gradient error of the whole model, against float32 with SDPA.

    python benchmarks/long_context.py .model/SmolLM2-135M-Instruct --output docs/long_context.jsonl
    python benchmarks/long_context.py --report docs/long_context.jsonl          # its part of docs/sums.md

Six sequences of English, one at a time; gradients of their mean loss. FP8 attention stands in the float32 model, BF16 is the whole
model in BF16 with SDPA. An older package is measured with --label before, as by benchmarks/sums.py. Records are appended.
"""

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from host import environment
from records import append, read
from sums_report import number, provenance, replaced, table
from torch import Tensor
from transformers import PreTrainedModel

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.cli.loading import load, read_text, token_blocks

SEQUENCES, LENGTH, BIN = 6, 8192, 1024
BF16 = "BF16 with SDPA"
VARIANTS: dict[str, dict[str, Any]] = {
    'precision="standard"': {},
    'precision="high"': {"precision": "high"},
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head", "norm")
"""Of parameters, by the end of their module's name."""


def kind_of(name: str) -> str:
    """The kind of a parameter, by its name. Raises ValueError for one of no kind."""
    module = name.split(".")[-2]
    for kind in KINDS:
        if module.endswith(kind):
            return kind
    raise ValueError(f"{name} is of none of the kinds {KINDS}")


class Run:
    """One pass over all sequences: log-probabilities as they come, and the sum of the gradients, in float32 for every model."""

    def __init__(self, model: PreTrainedModel, ids: Tensor):
        self.model, self.ids = model, ids
        self.gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}

    def __iter__(self) -> Iterator[Tensor]:
        """Log-probabilities of each sequence, (L, vocabulary) float32; the backward of its loss has run by then."""
        for row in self.ids:
            logits = self.model(input_ids=row[None], use_cache=False).logits[0].float()
            (F.cross_entropy(logits[:-1], row[1:]) / len(self.ids)).backward()
            for name, parameter in self.model.named_parameters():
                self.gradients[name] += parameter.grad.float()
            self.model.zero_grad(set_to_none=True)
            yield logits.detach().log_softmax(-1)


def by_position(x: Tensor) -> list[float]:
    """Means over bins of BIN positions, all sequences: (sequences, L) → L/BIN."""
    return x.double().unflatten(1, (-1, min(BIN, x.shape[1]))).mean((0, 2)).tolist()


def kl(exact: Tensor, ours: Tensor) -> Tensor:
    """KL(exact ‖ ours) of each position, in nats, a bin of positions at a time: (L,)."""
    pairs = zip(exact.split(BIN), ours.split(BIN), strict=True)
    return torch.cat([(x.exp() * (x - y)).sum(-1) for x, y in pairs])


def losses(log_probabilities: Tensor, row: Tensor) -> Tensor:
    """Of every token but the first, in nats: (L − 1,)."""
    return -log_probabilities[:-1].gather(-1, row[1:, None])[:, 0]


def gradient_errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """‖g − g₃₂‖ / ‖g₃₂‖, of all parameters and by their kind."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, truth in exact.items():
        for kind in ("all", kind_of(name)):
            squares[kind][0] += float((ours[name] - truth).double().square().sum())
            squares[kind][1] += float(truth.double().square().sum())
    return {kind: (error / norm) ** 0.5 for kind, (error, norm) in squares.items()}


@contextmanager
def variant(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """The model as a variant has it."""
    if name == BF16:
        yield copy.deepcopy(model).to(torch.bfloat16)
        return
    patch_model(model, **VARIANTS[name])
    try:
        yield model
    finally:
        unpatch_model(model)


def measure(model: PreTrainedModel, ids: Tensor, names: list[str]) -> Iterator[dict[str, Any]]:
    """A record of each variant."""
    run = Run(model, ids)
    exact = list(run)
    exact_gradients = run.gradients
    for name in names:
        with variant(model, name) as changed:
            run = Run(changed, ids)
            divergence, difference = [], []
            for row, theirs, ours in zip(ids, exact, run, strict=True):
                divergence.append(kl(theirs, ours))
                difference.append(losses(ours, row) - losses(theirs, row))
            errors = gradient_errors(run.gradients, exact_gradients)
            rows = [] if name == BF16 else geometry_report(changed).rows
        yield {
            "variant": name,
            "sequences": len(ids),
            "length": ids.shape[1],
            "kl": by_position(torch.stack(divergence)),
            "loss": float(torch.stack(difference).double().mean()),
            "gradient": errors,
            "overflows": sum(row["overflows"] for row in rows),
        }


def name_of(record: dict[str, Any]) -> str:
    return record["variant"] + ("" if record["label"] == "now" else f", {record['label']}")


def page_part(records: list[dict[str, Any]]) -> str:
    """KL by position and gradient errors, of the last record of each variant and label."""
    found = {name_of(r): r for r in records}
    if not found:
        return "No records."
    shapes = {(r["model"], r["sequences"], r["length"]) for r in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"the records are of several models or lengths: {sorted(shapes)}")
    ((model, sequences, length),) = shapes
    bins = len(next(iter(found.values()))["kl"])
    ends = [f"to {length // bins * (i + 1):,}" for i in range(bins)]
    rows = [[n, *(f"{x:.4f}" for x in r["kl"]), f"{r['loss']:+.4f}", str(r["overflows"])] for n, r in found.items()]
    kinds = [kind for kind in ("all", *KINDS) if all(kind in r["gradient"] for r in found.values())]
    errors = [[n, *(number(r["gradient"][kind]) for kind in kinds)] for n, r in found.items()]
    lines = [
        f"{model}, {sequences} sequences of {length:,} tokens of English, against the float32 model with SDPA.",
        "Generated by `python benchmarks/long_context.py --report docs/long_context.jsonl`.",
        "",
        "**KL by position**, nats per token, and the difference of the mean loss.",
        "",
        *table(["model", *ends, "loss", "overflows"], rows),
        "**Gradient error**, ‖g − g₃₂‖ / ‖g₃₂‖, of the whole model and by kind of parameter.",
        "",
        *table(["model", *kinds], errors),
    ]
    return "\n".join([*lines, provenance(list(found.values()))])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; default: print only")
    parser.add_argument("--report", type=Path, help="write these JSON lines' part of sums.md beside them")
    parser.add_argument("--label", default="now", help='"before" for an older package; default: %(default)s')
    parser.add_argument("--variants", nargs="+", default=[BF16, *VARIANTS], choices=[BF16, *VARIANTS])
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.report:
        page = arguments.report.with_name("sums.md")
        page.write_text(replaced(page.read_text(), "long context", page_part(read(arguments.report))))
        return
    if arguments.model is None:
        parser.error("a model, or --report, is needed")
    host = environment("transformers")
    model, tokenizer = load(arguments.model)
    model.eval().to(arguments.device)
    ids = token_blocks(tokenizer, read_text(None), arguments.length, arguments.sequences).to(arguments.device)
    shared = {"label": arguments.label, "model": Path(arguments.model).name, "environment": host}
    for record in measure(model, ids, arguments.variants):
        print(record, flush=True)
        if arguments.output:
            append(arguments.output, [record | shared])


if __name__ == "__main__":
    main()
