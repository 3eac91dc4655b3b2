"""Whole training steps on one GPU: forward, loss, backward, clipping, fused AdamW, and for us the refresh of all scales.

    python benchmarks/step.py --models Llama-3-8B --lengths 8192 --budget-seconds 500 --output docs/step.jsonl
    python benchmarks/step.py --render docs/step.jsonl --output docs/step       # writes .md and .png

Published shapes with random BF16 weights and optimizer states, as many of their layers as fit, one sequence of random tokens,
vocabulary 32,768 up to 8,192 tokens and 1,024 above, the whole loss head in one piece, all the same for every attention. The
contenders share parameters, gradients and optimizer states and take turns in blocks of three steps, so that clocks and heat drift
for all alike. Before any timing each contender passes the gate of `step_gate`. The rows of a configuration are appended to the JSON
lines as it finishes; a configuration that the file already has, of the same commit and GPU, is skipped. What lacks memory, fails or
is wrong is a row, too.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from host import environment
from step_gate import (
    GATE_LENGTH,
    FirstStep,
    Tolerance,
    coherent,
    first_step,
    loss_difference,
    tolerance,
    wrong_in_detail,
    wrong_in_full,
)
from step_models import CONTENDERS, SHAPES, Contender, build, compile_layers, contend, counters, vocabulary
from step_report import plot, to_markdown
from step_timing import (
    BLOCK,
    WARMUP,
    OutOfMemory,
    Times,
    blocks_for,
    layers_that_fit,
    make_optimizer,
    release,
    time_block,
)
from torch import Tensor

SETTINGS = {  # gradient checkpointing, torch.compile
    "checkpointing": (True, False),
    "plain": (False, False),
    "compile": (False, True),
    "checkpointing, compile": (True, True),
}
LENGTHS = (8192, 16384, 32768, 4096, 2048)
MODELS = ("Llama-3-8B", "Llama-3.2-1B", "Mistral-7B")
LAST = "Mistral-7B"  # without a window it is the first under another name: after everything else
DEFAULT_CONTENDERS = ("SDPA cuDNN", "SDPA flash", "Liger + SDPA cuDNN", "hf_geoscale")
ANY_SDPA = "SDPA"  # joins where there is a window, whose dense mask flash does not take and cuDNN may not
COHERENT = "on repeated tokens, "
"""Before what was wrong there."""
LONGER = 2.5
"""Seconds of a configuration of twice the length over this one's, at most (tokens twice, attention's share four times)."""


@dataclass(frozen=True)
class Configuration:
    """What all contenders of one comparison share."""

    model: str
    length: int
    setting: str
    window: int | None
    layers_limit: int | None

    def __str__(self) -> str:
        return f"{self.model}, {self.length} tokens, {self.setting}"


def configurations(arguments: argparse.Namespace) -> list[Configuration]:
    """In order of importance."""
    groups = [[m for m in arguments.models if (m == LAST) == last] for last in (False, True)]
    return [
        Configuration(m, length, setting, arguments.window if m == LAST else None, arguments.max_layers)
        for group in groups
        for setting in arguments.settings
        for m in group
        for length in arguments.lengths
    ]


def reason_of(error: Exception) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, OutOfMemory)):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


class Comparison:
    """One configuration: its contenders, and why some of them have no times."""

    def __init__(self, configuration: Configuration, names: list[str], device: str, steps: int | None = None):
        self.configuration, self.steps = configuration, steps
        self.checkpointing, self.compiled = SETTINGS[configuration.setting]
        model, length, window = configuration.model, configuration.length, configuration.window
        self.layers = layers_that_fit(model, length, window, self.checkpointing, configuration.layers_limit)
        self.base = build(model, self.layers, length, window, device)
        self.optimizer = make_optimizer(list(self.base.parameters()))
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.base.config.vocab_size, (1, length), generator=generator).to(device)
        self.status: dict[str, str] = {}
        self.times: dict[str, Times] = {}
        self.first: dict[str, dict[str, float]] = {}  # losses and gradient norms of the gate, and what may differ
        self.contenders: dict[str, Contender] = {}
        for name in names:
            self.attempt(name, lambda name=name: self.contenders.update({name: self.contend(name)}))

    def contend(self, name: str, **overrides) -> Contender:
        return contend(name, self.base, self.checkpointing, **overrides)

    def attempt(self, name: str, action) -> Any:
        """The action's result; None, and the contender is out, if it raises."""
        try:
            return action()
        except Exception as error:  # any failure of a rival is a row
            self.drop(name, reason_of(error))
        self.base.zero_grad(set_to_none=True)
        release()
        return None

    def drop(self, name: str, reason: str) -> None:
        self.status[name] = reason
        self.contenders.pop(name, None)
        print(f"  {name}: {reason}", flush=True)

    def first_steps(self, ids: Tensor, details: bool) -> dict[str, FirstStep]:
        found = {
            name: self.attempt(name, lambda c=c: first_step(c, ids, details))
            for name, c in list(self.contenders.items())
        }
        return {name: step for name, step in found.items() if step is not None}

    def gate(self) -> Tolerance | None:
        """Drop every contender that is not right; None if there is no SDPA to compare with."""
        allowed: dict[str, Tolerance] = {}
        inputs = {"": self.ids, COHERENT: coherent(self.ids)}
        for words, ids in inputs.items():
            found = self._gate_in_detail(ids[:, :GATE_LENGTH], words)
            if found is None:
                return None
            allowed[words] = found
        if self.compiled:
            for contender in self.contenders.values():
                compile_layers(contender.model)
        for words, ids in inputs.items():
            self._gate_in_full(ids, words, allowed[words])
        return allowed[""]

    def _gate_in_detail(self, short: Tensor, words: str) -> Tolerance | None:
        steps = self.first_steps(short, details=True)
        rival = next((name for name in steps if name.startswith("SDPA")), None)
        if rival is None:
            return None
        specification = self.attempt(
            "specification", lambda: first_step(self.contend("hf_geoscale", backend="reference"), short, details=True)
        )
        if specification is None:
            return None
        allowed = tolerance(specification, steps[rival])
        for name, step in steps.items():
            if reason := wrong_in_detail(step, steps[rival], allowed):
                self.drop(name, f"wrong: {words}{reason}")
        del specification, steps
        release()
        return allowed

    def _gate_in_full(self, ids: Tensor, words: str, allowed: Tolerance) -> None:
        steps = self.first_steps(ids, details=False)
        rival = next((name for name in steps if name.startswith("SDPA")), None)
        first = {name: {"loss": step.loss, "norm": step.norm} for name, step in steps.items()}
        for name, step in steps.items() if rival else ():
            first[name]["token_losses"] = loss_difference(step, steps[rival])
            if reason := wrong_in_full(step, steps[rival], allowed, independent=not words):
                self.drop(name, f"wrong: {words}{reason}")
        if not words:
            most = allowed.mean_loss(ids.shape[1] - 1)
            self.first = first | {"allowed": {"loss": most, "token_losses": allowed.loss, "norm": allowed.norm}}

    def measure(self) -> None:
        """Fill `times`, contenders taking turns."""
        seconds = 0.0
        for name, contender in list(self.contenders.items()):
            started = time.perf_counter()
            warm = Times()
            self.attempt(name, lambda c=contender, w=warm: time_block(c, self.optimizer, self.ids, w, WARMUP))
            seconds += warm.step[-1] / 1e3 if warm.step else 0.0
            print(f"  {name}: warm after {time.perf_counter() - started:.1f} s", flush=True)
        if not self.contenders:
            return
        steps = self.steps or BLOCK
        for _ in range(1 if self.steps else blocks_for(seconds)):
            for name, contender in list(self.contenders.items()):
                times = self.times.setdefault(name, Times())
                self.attempt(name, lambda c=contender, t=times: time_block(c, self.optimizer, self.ids, t, steps))

    def rows(self, host: dict[str, str]) -> list[dict[str, Any]]:
        shared = asdict(self.configuration) | {
            "layers": self.layers,
            "vocabulary": self.base.config.vocab_size,
            "checkpointing": self.checkpointing,
            "compiled": self.compiled,
            "first_steps": self.first,
        }
        measured = {name: asdict(times) for name, times in self.times.items() if name in self.contenders}
        statuses = dict.fromkeys(measured, "ok") | self.status
        counts = {name: counters(x) for name, x in self.contenders.items() if x.ours}
        return [
            shared
            | {"contender": name, "status": status, "times": measured.get(name), "environment": host}
            | ({"counters": counts[name]} if name in counts else {})
            for name, status in sorted(statuses.items(), key=lambda item: (*CONTENDERS, "specification").index(item[0]))
        ]


def compare(
    configuration: Configuration, names: list[str], host: dict, steps: int | None = None
) -> list[dict[str, Any]]:
    """Gate, time and describe one configuration."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        comparison = Comparison(configuration, names, device, steps)
    except (torch.cuda.OutOfMemoryError, OutOfMemory) as error:
        shared = asdict(configuration) | {"layers": 0, "vocabulary": vocabulary(configuration.length), "times": None}
        return [shared | {"contender": name, "status": reason_of(error), "environment": host} for name in names]
    if comparison.gate() is None:
        for name in list(comparison.contenders):
            comparison.drop(name, "not timed: no SDPA, or no specification, ran to compare with")
    comparison.measure()
    return comparison.rows(host)


def measured_already(path: Path | None, host: dict[str, str]) -> set[Configuration]:
    """Configurations that a file has rows of, from the same GPU and commit."""
    if path is None or not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    fields = Configuration.__dataclass_fields__
    alike = (r for r in rows if all(r["environment"][key] == host[key] for key in ("gpu", "commit")))
    return {Configuration(**{name: row[name] for name in fields}) for row in alike}


def run(arguments: argparse.Namespace) -> None:
    started, host = time.perf_counter(), environment("transformers", "liger-kernel")
    done = measured_already(arguments.output, host)
    took, last = 0.0, 0  # seconds of the longest configuration so far, and its length
    for configuration in configurations(arguments):
        elapsed = time.perf_counter() - started
        if configuration in done:
            continue
        expected = took * (LONGER if configuration.length > last else 1.0)
        if arguments.budget_seconds and elapsed + expected > arguments.budget_seconds:
            print(f"stopped before {configuration}: {elapsed:.0f} s used, and it would take about {expected:.0f} s")
            break
        print(configuration, flush=True)
        names = list(dict.fromkeys([*arguments.contenders, *([ANY_SDPA] if configuration.window else [])]))
        rows = compare(configuration, names, host, arguments.steps)
        if SETTINGS[configuration.setting][1]:
            torch.compiler.reset()
        release()
        if arguments.output:
            with arguments.output.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        print(to_markdown(rows, notes=False), flush=True)
        took, last = max((took, last), (time.perf_counter() - started - elapsed, configuration.length))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT_CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--max-layers", type=int, help="no more layers than this, where more would fit")
    parser.add_argument("--window", type=int, help="Mistral's sliding window (v0.1: 4096); default: none, as v0.3")
    parser.add_argument("--steps", type=int, help="timed steps of each contender, in one block; default: by their time")
    parser.add_argument("--budget-seconds", type=float, help="start no configuration that would probably end later")
    parser.add_argument("--output", type=Path, help=".jsonl to append to; with --render, path without suffix")
    parser.add_argument("--render", type=Path, nargs="+", help="merge .jsonl files into table and plot; later rows win")
    arguments = parser.parse_args(argv)
    if not arguments.render:
        return run(arguments)
    rows = [json.loads(line) for path in arguments.render for line in path.read_text().splitlines()]
    table = to_markdown(rows)
    print(table)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(table)
        plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
