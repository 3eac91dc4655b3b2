"""Do the fragility diagnostics predict what low precision does? Layers, lengths, training steps, planted instabilities, cost.

    python benchmarks/fragility.py .model/SmolLM2-135M-Instruct --output docs/fragility.md
    python benchmarks/fragility.py --render docs/fragility.jsonl --output docs/fragility.md

Writes the page, its records (.jsonl) and figure (.png). The records of each part are written as it ends; a second call with the
same --output does the parts that are missing. `--workers` runs that many parts side by side, except those that time the callback.
For one H100 80 GB; on a CPU only `--quick` is of use, a smoke test of a minute without the model, whose numbers mean nothing.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from fragility_measure import layer_record, length_record
from fragility_tables import plot, to_markdown
from fragility_training import callback_cost, planted, series, small_gpt2, train
from fragility_warnings import TUNING_SEEDS
from host import environment
from records import append, read
from torch import Tensor
from transformers import PreTrainedModel

from hf_geoscale.cli.loading import load, read_text, token_blocks
from hf_geoscale.integrations.fragility_callback import EVERY_N_STEPS

FULL = {
    "shape": {"width": 256, "layers": 8},
    "length": 256,
    "long": 1024,
    "lengths": (128, 512, 1024),
    "steps": 200,
    "every": 8,
    "batch": 16,
    "checkpoints": (0, 100, 200),
    "series_seeds": (0, 1),
    "seeds": (0, 1, 2),
    "ramp": 120,
    "planted_every": 2,
    "planted_steps": 240,
    "tuning_checkpoints": (0, 60),
    "cost_steps": 120,
    "tuning_cost_steps": 120,
}
SMALL = FULL | {
    "shape": {"width": 128, "layers": 6},
    "length": 128,
    "steps": 120,
    "every": 4,
    "batch": 8,
    "checkpoints": (0, 60, 120),
    "ramp": 70,
    "planted_steps": 140,
    "tuning_checkpoints": (0,),
    "tuning_cost_steps": 0,
}
QUICK = FULL | {
    "shape": {"width": 64, "layers": 3},
    "length": 48,
    "long": 96,
    "lengths": (32, 96),
    "steps": 26,
    "every": 2,
    "batch": 2,
    "checkpoints": (0, 4),
    "series_seeds": (0,),
    "seeds": (0,),
    "ramp": 14,
    "planted_every": 1,
    "planted_steps": 26,
    "cost_steps": 3,
    "tuning_cost_steps": 3,
}
LEARNING_RATE = 1e-3
"""Of the small GPT-2: trains it fast and stably."""

TUNING_RATE = 2e-5
NAME = "GPT-2 trained here"
Parts = dict[str, Callable[[], list[dict]]]
"""What measures each part of the records; none depends on another."""

TIMED = ("cost", "fine-tuning cost")
"""Parts that run alone, because they measure time."""


def byte_blocks(length: int) -> Tensor:
    """Python's manual as bytes: (N, length); the last tenth is held out."""
    data = torch.frombuffer(bytearray(read_text(None).encode()), dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


def settings_of(model, ids_of, lengths: tuple, setting: dict) -> list[dict]:
    """Layer and length records of a model as it is now."""
    records = []
    for length in lengths:
        ids = ids_of(length)
        records += [*layer_record(model, ids, setting), length_record(model, ids, setting)]
    return records


def checkpoint_records(plan: dict, device: str) -> list[dict]:
    """Layers and lengths at checkpoints of one GPT-2."""
    records: list[dict] = []
    blocks = byte_blocks(plan["long"])
    cut = len(blocks) * 9 // 10
    held_out = blocks[cut:].to(device)
    model = small_gpt2(0, plan["long"], **plan["shape"]).to(device)
    rows = blocks[:cut, : plan["length"]]
    before = 0
    for step in plan["checkpoints"]:
        run = {"batch": plan["batch"], "rate": warmed}
        train(model, rows, step - before, seed=step, observe=lambda *_: None, **run)
        before = step
        setting = {"model": NAME, "step": step, "seed": 0}
        records += settings_of(model.eval(), lambda n: held_out[:1, :n], plan["lengths"], setting)
    return records


def warmed(step: int) -> float:
    """The GPT-2's learning rate after `step` steps."""
    return LEARNING_RATE * min(1.0, (step + 1) / 20)


def gpt2_parts(plan: dict, device: str) -> Parts:
    """Checkpoints of one GPT-2, series of several, planted instabilities, the callback's cost."""
    short = byte_blocks(plan["length"])
    cut = len(short) * 9 // 10
    rows, held_out = short[:cut], short[cut : cut + 1].to(device)

    def one_series(seed: int) -> list[dict]:
        model = small_gpt2(seed, plan["length"], **plan["shape"]).to(device)
        run = {"steps": plan["steps"], "seed": seed, "batch": plan["batch"], "rate": warmed}
        return series(model, rows, held_out, plan["every"], {"model": NAME, "seed": seed}, **run)

    def one_planted(kind: str, seed: int) -> list[dict]:
        options = {"batch": plan["batch"], "shape": plan["shape"], "learning_rate": LEARNING_RATE}
        options |= {"ramp": plan["ramp"], "every": plan["planted_every"], "steps": plan["planted_steps"]}
        return [planted(rows, held_out, kind=kind, seed=seed, **options)]

    def cost() -> list[dict]:
        model = small_gpt2(0, plan["length"], **plan["shape"]).to(device)
        return [callback_cost(model, rows, plan["cost_steps"], plan["batch"], NAME, EVERY_N_STEPS)]

    parts: Parts = {"checkpoints": partial(checkpoint_records, plan, device)}
    parts |= {f"series {seed}": partial(one_series, seed) for seed in plan["series_seeds"]}
    kinds = {"tuning": TUNING_SEEDS, "stable": plan["seeds"], "ramp": plan["seeds"]}
    parts |= {f"{kind} {seed}": partial(one_planted, kind, seed) for kind, seeds in kinds.items() for seed in seeds}
    return parts | {"cost": cost}


def smollm2_blocks(folder: str, plan: dict, device: str) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The model, sequences to train on (N, L/2), and one held out (1, L)."""
    model, tokenizer = load(folder)
    length = max(plan["lengths"])
    blocks = token_blocks(tokenizer, read_text(None), length, 90)
    return model.eval().to(device), blocks[:-2].view(-1, length // 2), blocks[-1:].to(device)


def smollm2_records(folder: str, plan: dict, device: str) -> list[dict]:
    """Checkpoints and series of a fine-tuning."""
    model, half, held_out = smollm2_blocks(folder, plan, device)
    name, length = Path(folder).name, held_out.shape[1]
    records: list[dict] = []
    run = {"batch": 4, "rate": lambda step: TUNING_RATE}
    for step in plan["tuning_checkpoints"]:
        if step:
            every = max(1, step // 30)
            setting = {"model": name, "seed": 0}
            records += series(model, half, held_out[:, : length // 2], every, setting, steps=step, seed=0, **run)
        setting = {"model": name, "step": step, "seed": 0}
        records += settings_of(model, lambda n: held_out[:, :n], plan["lengths"], setting)
    return records


def smollm2_cost(folder: str, plan: dict, device: str) -> list[dict]:
    """The callback's cost in a fine-tuning."""
    model, half, _ = smollm2_blocks(folder, plan, device)
    return [callback_cost(model, half, plan["tuning_cost_steps"], 4, Path(folder).name, EVERY_N_STEPS)]


def all_parts(folder: str | None, plan: dict, device: str) -> Parts:
    parts: Parts = {} if folder is None else {"fine-tuning": partial(smollm2_records, folder, plan, device)}
    parts |= gpt2_parts(plan, device)
    if folder is not None and plan["tuning_cost_steps"]:
        parts["fine-tuning cost"] = partial(smollm2_cost, folder, plan, device)
    return parts


def describe(arguments: argparse.Namespace) -> dict:
    """Where and by what the records were made."""
    found = environment("transformers")
    model = f" {Path(arguments.model).name}" if arguments.model else ""
    said = f"python benchmarks/fragility.py{model}{' --quick' if arguments.quick else ' --small' if arguments.small else ''}"
    device = found["gpu"] if arguments.device == "cuda" else "CPU"
    return {"command": said, "device": device} | {k: found[k] for k in ("driver", "torch", "transformers", "triton")}


def missing(parts: Parts, records: list[dict]) -> list[str]:
    done = {record["part"] for record in records if record["kind"] == "part"}
    return [name for name in parts if name not in done]


def side_by_side(workers: int, names: list[str], seconds: float) -> None:
    """Measure these parts in processes of their own, `workers` at a time, each of which adds to the records."""
    started = time.perf_counter()

    def one(name: str) -> None:
        left = seconds - (time.perf_counter() - started)
        subprocess.run(
            [sys.executable, *sys.argv, "--workers", "1", "--parts", name, "--seconds", str(left)], check=True
        )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, names))


def measure(parts: Parts, host: dict, path: Path, seconds: float) -> bool:
    """Do the parts that `path` lacks, each written as it ends, starting none after `seconds`; whether all are there.

    Raises:
        ValueError: the file is of another command or host.
    """
    started, commit = time.perf_counter(), environment()["commit"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, [host])
    first, *records = read(path)
    if first != host:
        raise ValueError(f"{path} holds records of {first}, not of {host}; give another --output, or remove it")
    for name in missing(parts, records):
        part = parts[name]
        if time.perf_counter() - started > seconds:
            return False
        begun = time.perf_counter()
        found = part()
        mark = {"kind": "part", "part": name, "seconds": time.perf_counter() - begun, "commit": commit}
        append(path, (*found, mark))
        print(f"{name}: {mark['seconds']:.0f} s", file=sys.stderr, flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="folder or hub id of SmolLM2-135M-Instruct; left out: the small GPT-2 alone"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="Markdown file to write, with .jsonl and .png beside it"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny model, few steps")
    parser.add_argument("--small", action="store_true", help="what a CPU does in half an hour: no fine-tuning of MODEL")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no part after this; call again for the rest"
    )
    parser.add_argument("--workers", type=int, default=1, help="parts measured side by side")
    parser.add_argument("--parts", nargs="+", help="measure these alone, and make no page")
    parser.add_argument("--render", type=Path, help="make the page from these records instead of measuring")
    arguments, started = parser.parse_args(), time.perf_counter()
    if (path := arguments.render) is None:
        plan = QUICK if arguments.quick else SMALL if arguments.small else FULL
        parts = all_parts(arguments.model, plan, arguments.device)
        host, path = describe(arguments), arguments.output.with_suffix(".jsonl")
        if arguments.parts:
            measure({name: parts[name] for name in arguments.parts}, host, path, arguments.seconds)
            return
        if arguments.workers > 1:
            measure({}, host, path, 0.0)  # makes the file, or finds that it is of another command
            _, *records = read(path)
            untimed = [name for name in missing(parts, records) if name not in TIMED]
            side_by_side(arguments.workers, untimed, arguments.seconds - (time.perf_counter() - started))
        left = arguments.seconds - (time.perf_counter() - started)
        if not measure(parts, host, path, left):
            print(f"time is up; call again for the rest of {path}", file=sys.stderr)
            return
    host, *records = read(path)
    arguments.output.write_text(to_markdown(host, records))
    plot(records, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
