"""`hf-geoscale transients`: sudden changes of the weights under every scaling strategy, and what overflows in each.

FP8 operands and FP8 logits (arXiv 2602.18851) in all runs. Scenarios, each on a real model:
fresh     pretrained weights under a fresh history: the first forwards after patching
resume    fine-tuning, then a restart from the weights and the optimizer alone, without FP8 state
spike10, spike100   fine-tuning with a learning rate 10 or 100 times as high for a few steps
other     a history made under freshly initialised weights, then the pretrained checkpoint is loaded into the same model
stress4, stress16   weights of all query and key projections multiplied under an old history
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import AutoAlpha, Delayed, GeoScaleConfig
from ..errors import NonFiniteWeightsError
from ..integrations import geoscale_layers, patch_model, unpatch_model
from .failures import InputError
from .loading import check_length, load_model, load_tokenizer, read_text, token_blocks
from .loss_plot import plot_possible
from .run_folder import check_folder
from .transients_report import SPIKE_STEPS, write_report

STRATEGIES: dict[str, GeoScaleConfig | None] = {
    "unquantised": None,
    "geometry": GeoScaleConfig(quantize_logits=True),
    "rank-aware": GeoScaleConfig(quantize_logits=True, bound="rank_aware"),
    "auto-alpha": GeoScaleConfig(quantize_logits=True, bound="auto_alpha", auto_alpha=AutoAlpha(burn_in=2)),
    "delayed, max of 1024": GeoScaleConfig(quantize_logits=True, scaling="delayed"),
    "delayed, most recent": GeoScaleConfig(
        quantize_logits=True, scaling="delayed", delayed=Delayed(history=1, reduction="most_recent")
    ),
    "current": GeoScaleConfig(quantize_logits=True, scaling="current"),
}
"""A burn-in of two calls is short, as the runs are."""

SCENARIOS = ("fresh", "resume", "spike10", "spike100", "other", "stress4", "stress16")
TRAINED = ("resume", "spike10", "spike100")
"""Scenarios with training, which depend on the order of data and so on the seed; the others run once."""


@dataclass(frozen=True)
class Settings:
    """What decides the records. Learning rate: of AdamW, constant but for the spike."""

    model: str
    text: str | None = None
    scenarios: tuple[str, ...] = SCENARIOS
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    seeds: int = 3
    steps: int = 12
    length: int = 128
    batch_size: int = 1
    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        for name, given, known in (
            ("scenarios", self.scenarios, SCENARIOS),
            ("strategies", self.strategies, tuple(STRATEGIES)),
        ):
            unknown = [x for x in given if x not in known]
            if unknown or not given:
                raise InputError(f"{name} must be among {known}, got {tuple(given)}")
        if self.steps < 3 * SPIKE_STEPS:
            raise InputError(f"steps must be at least {3 * SPIKE_STEPS}, so that a spike has a before and an after")


class Run:
    """One model under one strategy: steps it, and records what each step saw."""

    def __init__(self, model: PreTrainedModel, strategy: str, ids: Tensor, settings: Settings, seed: int):
        self.model, self.ids, self.settings = model, ids, settings
        self.config = STRATEGIES[strategy]
        self.generator = torch.Generator().manual_seed(seed)
        self.patch()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)

    def patch(self) -> None:
        """(Re)start the strategy without a memory."""
        unpatch_model(self.model)
        if self.config is not None:
            patch_model(self.model, self.config)

    def forward(self) -> dict[str, Any]:
        """The first batch, without gradients."""
        with torch.no_grad():
            loss = self.model(
                input_ids=self.ids[: self.settings.batch_size], labels=self.ids[: self.settings.batch_size]
            ).loss
        return self.record(loss.item())

    def train(self, factor: float = 1.0) -> dict[str, Any]:
        """One optimizer step at `factor` times the learning rate, on sequences drawn by the seed."""
        rows = torch.randint(len(self.ids), (self.settings.batch_size,), generator=self.generator)
        try:
            loss = self.model(input_ids=self.ids[rows], labels=self.ids[rows], use_cache=False).loss
        except NonFiniteWeightsError:  # an earlier step diverged
            return self.record(math.nan)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.record(loss.item())

    def record(self, loss: float) -> dict[str, Any]:
        """Loss, overflows by operand and worst utilisation (largest number before its cast / 448) since the last record."""
        overflows: dict[str, int] = {}
        used, logits = [0.0], [0.0]
        for layer in geoscale_layers(self.model):
            for operand, count in layer.statistics.overflows_by_operand.items():
                overflows[operand] = overflows.get(operand, 0) + count
            for operand, share in layer.statistics.range_used.items():
                (logits if operand == "logit" else used).append(float(share.amax()))
            layer.statistics.reset()
        finite = torch.isfinite(torch.tensor(loss)).item()
        return {
            "loss": loss,
            "finite": finite,
            "overflows": overflows,
            "utilisation": max(used),
            "logit_utilisation": max(logits),
        }


def multiply_queries_and_keys(model: PreTrainedModel, factor: float) -> None:
    """Multiply what makes queries and keys, in place. Raises InputError for a model whose projections have other names."""
    found = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".q_proj." in name or ".k_proj." in name:
                parameter.mul_(factor)
            elif ".c_attn." in name:  # GPT-2: queries, keys and values side by side
                parameter[..., : 2 * parameter.shape[-1] // 3].mul_(factor)
            else:
                continue
            found = True
    if not found:
        raise InputError(
            f"{type(model).__name__} has no q_proj, k_proj or c_attn to multiply; leave out the stress scenarios"
        )


def play(run: Run, scenario: str, start: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Records of one scenario, step by step; `event` marks those from the sudden change on."""
    steps = run.settings.steps
    if scenario == "fresh":
        for _ in range(SPIKE_STEPS):
            yield run.forward() | {"event": True}
    elif scenario == "resume":
        for _ in range(steps // 2):
            yield run.train() | {"event": False}
        run.patch()  # weights and optimizer are as saved; what FP8 remembered is gone
        for _ in range(steps - steps // 2):
            yield run.train() | {"event": True}
    elif scenario.startswith("spike"):
        factor = float(scenario.removeprefix("spike"))
        for step in range(steps):
            in_spike = SPIKE_STEPS <= step < 2 * SPIKE_STEPS
            yield run.train(factor if in_spike else 1.0) | {"event": step > SPIKE_STEPS}
    else:
        for _ in range(SPIKE_STEPS):
            yield run.forward() | {"event": False}
        if scenario == "other":
            run.model.load_state_dict(start)
        else:
            multiply_queries_and_keys(run.model, float(scenario.removeprefix("stress")))
        for _ in range(SPIKE_STEPS):
            yield run.forward() | {"event": True}


def fresh_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the same architecture as its own initialisation makes them."""
    torch.manual_seed(0)
    return type(model)(copy.deepcopy(model.config)).state_dict()


def runs_of(settings: Settings) -> list[tuple[str, int, str]]:
    """(scenario, seed, strategy) of every run, in order."""
    return [
        (scenario, seed, strategy)
        for scenario in settings.scenarios
        for seed in range(settings.seeds if scenario in TRAINED else 1)
        for strategy in settings.strategies
    ]


def play_all(
    settings: Settings,
    model: PreTrainedModel,
    ids: Tensor,
    records: list[dict],
    host: dict,
    output: Path,
    console: Console,
) -> None:
    """Every run in turn; its records are added to `records` and to transients.jsonl as soon as it is over."""
    start = {name: x.clone() for name, x in model.state_dict().items()}
    initial = fresh_weights(model) if "other" in settings.scenarios else {}
    for scenario, seed, strategy in runs_of(settings):
        unpatch_model(model)
        model.load_state_dict(initial if scenario == "other" else start)
        model.train(scenario in TRAINED)
        run = Run(model, strategy, ids, settings, seed)
        played = list(play(run, scenario, start))
        label = {"scenario": scenario, "strategy": strategy, "seed": seed}
        records += [label | {"step": step} | record for step, record in enumerate(played)]
        over = sum(sum(record["overflows"].values()) for record in played)
        console.print(f"{scenario}, seed {seed}, {strategy}: {over} overflows, loss {played[-1]['loss']:.3f}")
        (output / "transients.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (host, *records)))


def run_transients(settings: Settings, output: Path, console: Console) -> list[dict]:
    """Every scenario under every strategy; writes transients.jsonl after each run, .md and, with matplotlib, .png at the end.

    Ctrl-C in between writes the table of the runs that are over.

    Raises:
        InputError, UnsupportedModelError: unusable settings, model, text or folder. The message names the remedy.
    """
    check_folder(output)
    with_plot = plot_possible(console)
    text = read_text(settings.text)
    tokenizer = load_tokenizer(settings.model)
    available = len(tokenizer(text, verbose=False).input_ids) // settings.length
    count = max(min(available, settings.steps * settings.batch_size * 4), 1)
    ids = token_blocks(tokenizer, text, settings.length, count)
    model = load_model(settings.model, patchable=True)
    check_length(model.config, settings.length)
    logging.set_verbosity_error()
    if torch.cuda.is_available():
        model.cuda()
    host = asdict(settings) | {
        "model": Path(settings.model).name,  # no path of this machine
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    records: list[dict] = []
    output.mkdir(parents=True, exist_ok=True)
    try:
        play_all(settings, model, ids.to(model.device), records, host, output, console)
    except KeyboardInterrupt:
        over = len({(r["scenario"], r["seed"], r["strategy"]) for r in records})
        console.print(f"Interrupted: {over} of {len(runs_of(settings))} runs are over", style="bold")
        if not records:
            raise
        write_report(host, records, output, with_plot)
        console.print(f"their table is {output / 'transients.md'}", soft_wrap=True)
        raise
    table = write_report(host, records, output, with_plot)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    return records
