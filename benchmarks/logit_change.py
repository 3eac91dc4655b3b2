"""How high the learning rate may be: plain training, a fixed factor, q/k norm, QK-Clip and QuacK, under BF16 and FP8 attention.

    python benchmarks/logit_change.py --output docs/logit_change --workers 14
    python benchmarks/logit_change.py --render docs/logit_change.jsonl
    python benchmarks/logit_change.py --quick --output /tmp/logit_change

writes logit_change.md, .png and .jsonl, a line a run as it ends; a second call does the runs that are missing, so that `--seconds`
may cut it off. Minutes on one H100 80 GB with 16 CPU cores. `--quick`: seconds on a CPU, another and smaller experiment.

Each run trains a 4-layer Llama (width 256, 4 heads of 64; "q/k norm": a Qwen3 of the same size) from scratch on the bytes of the
English manual that ships with Python, BF16 autocast over float32 weights, 100 steps of 16 × 256 bytes; the rate warms up over a
tenth of the steps and stays, since one that falls lets a run recover. AdamW: the rate is of all parameters. Muon (torch.optim,
adjusted to match AdamW's RMS): the rate is of the layers' matrices, the rest has AdamW at 3e-3. Weight decay 0.1, no gradient
clipping. A probe, a copy under BF16 SDPA, looks at held-out text before the first step and every 10 steps.

Diverged: a loss that is not finite, or a last held-out loss more than RISE above the run's lowest. The highest stable rate of a
method is the largest of the sweep at which, and below which, no seed diverged. Learnt too little: did not diverge, but ends less
than LEARNT below the entropy of the byte frequencies. The highest rate that trains is the largest of the sweep at which no seed
diverged or learnt too little. What had been looked at before these rules and rates were chosen is on the page (HISTORY).
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from host import environment
from logit_change_report import CONTROLS, plot, to_markdown
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hf_geoscale import NonFiniteWeightsError, QKClip, QuacK, patch_model
from hf_geoscale.cli.loading import read_text
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.families import attention_sites
from hf_geoscale.integrations.logit_observer import LogitObserver

STEPS, PROBE_EVERY = 100, 10
BATCH, LENGTH, HELD_OUT = 16, 256, 16
SEEDS = (0, 1, 2)
RATES = {"AdamW": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "Muon": (0.1, 0.4, 1.6, 6.4)}
REST_RATE, WEIGHT_DECAY, BETAS = 3e-3, 0.1, (0.9, 0.95)
THRESHOLD = 100.0
ATTENTIONS = ("BF16", "FP8")
HISTORY = """\
The first rule here called learning too little unstable; it was rewritten after 352 runs whose rate fell to a tenth (commit
61fce98, AdamW up to 0.032, Muon up to 1): none of those diverged. Then ten runs on a CPU (plain and QuacK, τ = 0.1, seed 0)
were looked at, and the rate was made constant, the rates widened, the steps raised from 80 to 100, and the highest rate that
trains was added, all before any run below."""
"""What had been looked at when the rules and rates were chosen; part of the records."""

WARM_UP_STEPS = 3
"""Of a run that only compiles kernels, before the workers share its cache."""


@dataclass(frozen=True)
class Run:
    control: str
    attention: str
    optimizer: str
    rate: float
    seed: int
    steps: int = STEPS
    probe_every: int = PROBE_EVERY
    width: int = 256
    layers: int = 4
    batch: int = BATCH
    length: int = LENGTH


class Text(NamedTuple):
    training: Tensor  # (bytes,) int64
    held_out: Tensor  # (HELD_OUT, L)


def all_runs(quick: bool) -> list[Run]:
    """Seeds outermost, so that a run cut off has whole sweeps of the first seeds."""
    runs = [
        Run(control, attention, optimizer, rate, seed)
        for seed in SEEDS
        for optimizer, rates in RATES.items()
        for rate in rates
        for attention in ATTENTIONS
        for control in CONTROLS
    ]
    if not quick:
        return runs
    small = {"steps": 12, "probe_every": 4, "width": 64, "layers": 2, "batch": 2, "length": 32}
    return [replace(run, **small) for run in runs if run.seed < 2 and run.rate == RATES[run.optimizer][1]]


@cache
def text(length: int, device: str) -> Text:
    data = torch.frombuffer(bytearray(read_text(None).encode()), dtype=torch.uint8).long()
    held_out = data[-HELD_OUT * length :].view(HELD_OUT, length)
    return Text(data[: -HELD_OUT * length].to(device), held_out.to(device))


def byte_entropy() -> float:
    """Nats a byte of a model that knows the frequencies of the held-out bytes alone."""
    shares = torch.bincount(text(LENGTH, "cpu").held_out.flatten(), minlength=256).double()
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * shares.log()).sum())


def build(run: Run, device: str) -> PreTrainedModel:
    config_class, model_class = (
        (Qwen3Config, Qwen3ForCausalLM) if run.control == "q/k norm" else (LlamaConfig, LlamaForCausalLM)
    )
    config: Any = config_class(
        vocab_size=256,
        hidden_size=run.width,
        intermediate_size=3 * run.width,
        num_hidden_layers=run.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=run.width // 4,
        max_position_embeddings=run.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(run.seed)
    return model_class(config).to(device).train()


def optimizers(run: Run, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """What steps the model; the first holds W_Q and W_K, under the run's control."""
    adamw: dict[str, Any] = {"betas": BETAS, "weight_decay": WEIGHT_DECAY}
    if run.optimizer == "AdamW":
        found: list[Any] = [torch.optim.AdamW(model.parameters(), lr=run.rate, **adamw)]
    else:
        matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
        inside = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in inside]
        muon = torch.optim.Muon(matrices, lr=run.rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        found = [muon, torch.optim.AdamW(rest, lr=REST_RATE, **adamw)]
    if run.control.startswith(("QuacK", "fixed")):
        tau = float(run.control.rpartition("= ")[2])
        found[0] = QuacK(found[0], model, tau=tau, adaptive=run.control.startswith("QuacK"))
    return found


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: warm-up over a tenth, then all of it."""
    return min(1.0, (step + 1) / max(1, steps // 10))


class Probe:
    """Held-out loss and largest logit of a model, seen by a copy under BF16 SDPA."""

    def __init__(self, run: Run, device: str):
        self.model, self.device = build(run, device), device
        self.held_out = text(run.length, device).held_out
        self.observer = LogitObserver(self.model, [site.attention for site in attention_sites(self.model)])

    @torch.no_grad()
    def look(self, model: PreTrainedModel) -> tuple[float, float]:
        self.model.load_state_dict(model.state_dict())
        loss = float(loss_of(self.model, self.held_out, self.device))
        logits: Any = self.observer.drain()
        return loss, float(torch.stack(logits).amax())


def loss_of(model: PreTrainedModel, ids: Tensor, device: str) -> Tensor:
    with torch.autocast(device, dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def execute(run: Run) -> dict:
    """Train; the run, its training losses, its probes and counters, as a record."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started, model = time.perf_counter(), build(run, device)
    clips = run.control.startswith("QK-Clip")
    if run.attention == "FP8":
        patch_model(model, observe_logits=run.control == "QK-Clip, observed")
    stepped = optimizers(run, model)
    clip = QKClip(model, THRESHOLD, source=run.control.rpartition(", ")[2]) if clips else None
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in stepped]
    probe, data = Probe(run, device), text(run.length, device).training
    generator = torch.Generator().manual_seed(run.seed)
    losses, probes = [], [(0, *probe.look(model))]
    for step in range(run.steps):
        starts = torch.randint(len(data) - run.length, (run.batch, 1), generator=generator)
        try:
            loss = loss_of(model, data[(starts + torch.arange(run.length)).to(device)], device)
        except NonFiniteWeightsError:  # of a patched model, before its attention runs
            break
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        for optimizer, rates in zip(stepped, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, run.steps)
            optimizer.step()
            optimizer.zero_grad()
        if clip is not None:
            clip.step()
        if (step + 1) % run.probe_every == 0 or step + 1 == run.steps:
            probes.append((step + 1, *probe.look(model)))
    record = asdict(run) | {"losses": [round(x, 5) for x in losses], "probes": probes}
    record["clipped_heads"] = clip.clipped_heads if clip is not None else 0
    record["overflows"] = sum(layer.statistics.overflows for layer in geoscale_layers(model))
    return record | {"seconds": round(time.perf_counter() - started, 2)}


def host(arguments: argparse.Namespace) -> dict:
    found = environment("transformers")
    return {
        "command": " ".join(["python benchmarks/logit_change.py", *(["--quick"] if arguments.quick else [])]),
        "device": found["gpu"],
        **{name: found[name] for name in ("driver", "torch", "triton", "transformers", "commit")},
        "byte_entropy": byte_entropy(),
        "threshold": THRESHOLD,
        "runs": len(all_runs(arguments.quick)),
        "history": HISTORY,
    }


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("control", "attention", "optimizer", "rate", "seed", "steps", "width"))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Do the missing runs in `workers` processes, each appended to the records as it ends, until `seconds` have passed."""
    started = time.monotonic()
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(host(arguments)) + "\n")
    done = {key(json.loads(line)) for line in lines[1:]}
    runs = [run for run in all_runs(arguments.quick) if key(asdict(run)) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool, path.open("a") as file:
        if torch.cuda.is_available():  # compile each kernel once, not once a worker
            kinds = {run.control: replace(run, steps=WARM_UP_STEPS) for run in runs if run.attention == "FP8"}
            list(pool.map(execute, [kinds[name] for name in ("plain", "QK-Clip, observed") if name in kinds]))
        waiting = [pool.submit(execute, run) for run in runs]
        for count, future in enumerate(as_completed(waiting), len(done) + 1):
            file.write(json.dumps(future.result(), allow_nan=True) + "\n")
            file.flush()
            print(f"\r{count} runs, {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
            if time.monotonic() - started > arguments.seconds:
                pool.shutdown(wait=True, cancel_futures=True)
                break
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="path of the files to write, without ending")
    parser.add_argument("--render", type=Path, metavar="JSONL", help="print the page of recorded runs, run nothing")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no run after this; call again for the rest")
    parser.add_argument("--quick", action="store_true", help="a smoke test on tiny models")
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.render is None):
        parser.error("give --output or --render")
    path = arguments.render or arguments.output.with_suffix(".jsonl")
    if arguments.output is not None:
        measure(arguments, path)
    first, *records = (json.loads(line) for line in path.read_text().splitlines())
    page = to_markdown(first, records)
    print(page)
    if arguments.output is not None:
        arguments.output.with_suffix(".md").write_text(page)
        plot(first, records, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
