"""Does span scaling, as reconstructed here from the abstract of arXiv 2512.13033, lower the loss of a small GPT-2?

    python benchmarks/span_scaling.py --workers 15 --minutes 6 --output docs/span_scaling      # writes .jsonl and .md
    python benchmarks/span_scaling.py --small --output docs/span_scaling                   # a smaller model, on a CPU
    python benchmarks/span_scaling.py --render docs/span_scaling.jsonl             # prints the page again
    python benchmarks/span_scaling.py --quick                                      # every step, tiny, on a CPU

Byte-level GPT-2 models from random weights with FP8 attention, on the English manual that ships with Python; the tail of the
text is held out. Arms: "plain" gradients; "span", SpanScaling; "random", the same with a random subspace of equal rank, drawn anew
at every call; "uniform", dQ, dK and dV doubled. Tuning takes seeds of its own and as many runs for "plain" as for each of the next
two: five learning rates × three seeds, against five pairs of coefficients × three of these rates, those around the best of "plain".
Every arm and pair then runs at its best rate on the seeds of the comparison; within a seed all start from the same weights and see
the same batches. Each run is written to OUTPUT.jsonl as it ends; a second call with the same --output does those that are missing.
"""

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from host import environment
from span_scaling_report import SEEDS_MIN, best_rate, to_markdown
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_geoscale import SpanScaling, geometry_report, patch_model
from hf_geoscale.cli.loading import read_text

PAIRS = ((1.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 0.0), (2.0, 0.0))
UNIFORM = (2.0, 2.0)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (100, 101, 102)


@dataclass(frozen=True)
class Setup:
    """Shape of the model and of its training."""

    width: int = 256
    heads: int = 8
    layers: int = 4
    length: int = 256  # tokens of a sequence, which are bytes
    batch: int = 16
    steps: int = 300
    held_out: int = 256  # sequences at the end of the text
    seeds: int = 8


SMALL = Setup(width=64, heads=2, layers=2, length=128, batch=4, steps=150, held_out=64, seeds=8)
QUICK = Setup(width=32, heads=2, layers=1, length=48, batch=2, steps=3, held_out=4, seeds=2)


@dataclass(frozen=True)
class Run:
    phase: str  # "tune" or "compare"
    arm: str
    pair: tuple[float, float]
    rate: float
    seed: int


@dataclass(frozen=True)
class RandomSpans(SpanScaling):
    """The control: gradients split by a random subspace of token space, of the operand's rank."""

    def basis(self, x: Tensor) -> Tensor:
        return torch.randn_like(x, dtype=torch.float32)


@lru_cache(maxsize=1)
def text_of(setup: Setup, device: str) -> tuple[Tensor, Tensor]:
    """Bytes to train on (n,) and sequences held out (held_out, length)."""
    data = torch.frombuffer(bytearray(read_text(None).encode()), dtype=torch.uint8).long().to(device)
    cut = len(data) - setup.held_out * setup.length
    return data[:cut], data[cut:].view(setup.held_out, setup.length)


def model_of(setup: Setup, run: Run, device: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=256,
        n_positions=setup.length,
        n_embd=setup.width,
        n_head=setup.heads,
        n_layer=setup.layers,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    torch.manual_seed(run.seed)
    scaling = {"span": SpanScaling, "uniform": SpanScaling, "random": RandomSpans}.get(run.arm)
    model = GPT2LMHeadModel(config).to(device).train()
    spans = None if scaling is None else scaling(*run.pair)
    return patch_model(
        model, span_scaling=spans, fused_front_end=False
    )  # which spans do without: the same forward for all


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a tenth of the steps to warm up, then a cosine down to a tenth."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))


def loss_of(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, sequences: Tensor) -> float:
    return float(torch.stack([loss_of(model, part) for part in sequences.split(32)]).mean())


def measure(run: Run, setup: Setup, device: str) -> dict:
    """One training from start to end, as a record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    training, held_out = text_of(setup, device)
    model = model_of(setup, run, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, steps=setup.steps))
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(setup.steps):
        starts = torch.randint(len(training) - setup.length, (setup.batch, 1), generator=generator)
        loss_of(model, training[(starts + torch.arange(setup.length)).to(device)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    overflows = sum(row["overflows"] for row in geometry_report(model).rows)
    loss = held_out_loss(model, held_out)
    return {**asdict(run), "held_out": loss, "overflows": overflows, "seconds": time.perf_counter() - started}


def tuning(pairs: tuple, rates: tuple[float, ...], arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Run]:
    return [Run("tune", arm, pair, rate, seed) for arm in arms for pair in pairs for rate in rates for seed in seeds]


def rates_around(best: float, rates: tuple[float, ...] = RATES) -> tuple[float, ...]:
    """Three neighbouring rates of those that "plain" was tuned over, `best` among them."""
    middle = min(max(rates.index(best), 1), len(rates) - 2)
    return rates[middle - 1 : middle + 2]


def comparison(records: list[dict], seed: int) -> list[Run]:
    """Every arm and pair at its best rate in the tuning; "uniform", which was not tuned, at that of "plain"."""
    plain = best_rate(records, "plain", (1.0, 1.0))
    arms = [("plain", (1.0, 1.0), plain), ("uniform", UNIFORM, plain)]
    arms += [(arm, pair, best_rate(records, arm, pair)) for pair in PAIRS for arm in ("span", "random")]
    return [Run("compare", arm, pair, rate, seed) for arm, pair, rate in arms]


def host_of(setup: Setup, device: str, workers: int) -> dict:
    found = environment("transformers")
    options = {"pairs": PAIRS, "rates": RATES, "tuning_seeds": TUNING_SEEDS, "uniform": UNIFORM}
    versions = {name: found[name] for name in ("torch", "triton", "transformers")}
    described = {"device": found["gpu"] if device == "cuda" else "CPU", "driver": found["driver"], "workers": workers}
    return {**described, "versions": versions, **options, **asdict(setup)}


def key(run: dict) -> tuple:
    """What tells two runs of one set-up apart."""
    return run["phase"], run["arm"], tuple(run["pair"]), run["rate"], run["seed"]


def resumed(path: Path | None, host: dict) -> list[dict]:
    """Records of an earlier call, whose set-up must be this one's; a new file gets the host's line.

    Raises:
        ValueError: the file holds runs of another set-up or device.
    """
    if path is None:
        return []
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(host) + "\n")
        return []
    first, *records = map(json.loads, path.read_text().splitlines())
    free = ("seeds", "workers")
    now = json.loads(json.dumps(host))
    other = [name for name in now if name not in free and first.get(name) != now[name]]
    if other:
        raise ValueError(f"{path} holds runs with another {', '.join(other)}; give another --output, or remove it")
    return records


def measure_all(setup: Setup, device: str, workers: int, minutes: float, path: Path | None = None) -> list[dict]:
    """Records of the tuning and of as many seeds as start within the time, those in `path` taken over and the rest added to it."""
    records = resumed(path, host_of(setup, device, workers))
    commit = environment()["commit"]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:

        def finish(runs: list[Run]) -> None:
            done = {key(record) for record in records}
            missing = [run for run in runs if key(asdict(run)) not in done]
            for record in pool.imap_unordered(partial(measure, setup=setup, device=device), missing):
                records.append(record | {"commit": commit})
                line = json.dumps(records[-1])
                print(line, flush=True)
                if path is not None:
                    with path.open("a") as file:
                        file.write(line + "\n")

        first = Run(
            "warm-up", "plain", (1.0, 1.0), RATES[0], 0
        )  # one process fills the compiled kernels' cache for all
        pool.apply(measure, (first, replace(setup, steps=3), device))
        finish(tuning(((1.0, 1.0),), RATES, ("plain",), TUNING_SEEDS))
        rates = rates_around(best_rate(records, "plain", (1.0, 1.0)))
        finish(tuning(PAIRS, rates, ("span", "random"), TUNING_SEEDS[:1]))
        for seed in range(setup.seeds):
            if seed >= SEEDS_MIN and time.perf_counter() - started > 60 * minutes:
                break
            finish(comparison(records, seed))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that train side by side")
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--seeds", type=int, default=Setup.seeds, help="of the comparison")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further seed after this time")
    parser.add_argument("--small", action="store_true", help="what a CPU does in half an hour")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a minute on a CPU; its losses mean nothing"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.jsonl and OUTPUT.md; default: print only")
    parser.add_argument("--render", type=Path, help="print the page of records measured before")
    arguments = parser.parse_args()
    if arguments.render:
        host, *records = map(json.loads, arguments.render.read_text().splitlines())
        print(to_markdown(host, records))
        return
    setup = Setup(steps=arguments.steps, seeds=arguments.seeds)
    if arguments.small or arguments.quick:
        setup = SMALL if arguments.small else QUICK
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = arguments.output.with_suffix(".jsonl") if arguments.output else None
    records = measure_all(setup, device, arguments.workers, arguments.minutes, path)
    page = to_markdown(*json.loads(json.dumps([host_of(setup, device, arguments.workers), records])))
    print(page)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(page + "\n")


if __name__ == "__main__":
    main()
