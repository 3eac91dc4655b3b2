"""Training runs for the fragility benchmark: series of predictor and mismatch, planted instabilities, the callback's cost."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import torch
from fragility_measure import distance, exact_attention, logits, whole_model
from fragility_warnings import SIGNALS
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

from hf_geoscale import FragilityCallback, NormEpsilonController
from hf_geoscale.integrations.fragility import FragilityProbe
from hf_geoscale.stability import FragilityReport

RAMP_FACTOR = 1.12
"""Factor on the learning rate a step, once the ramp has begun: 10 × in 20 steps."""

BLOW_UP = 0.7
"""Nats by which a step's loss must exceed the least mean of ten successive losses so far to count as an instability."""

SPIKE = 2.0
"""Times the median of its past at which a BF16 mismatch counts as an error spike."""


class Finished(Exception):
    """A run has shown what it was started for."""


def small_gpt2(seed: int, length: int, width: int, layers: int) -> GPT2LMHeadModel:
    """A byte-level GPT-2 with random weights, heads of 64, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=256, n_positions=length, n_embd=width, n_head=width // 64, n_layer=layers)
    config.update(
        {  # no dropout
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    )
    return GPT2LMHeadModel(config)


def train(
    model: PreTrainedModel,
    blocks: Tensor,  # (N, L)
    steps: int,
    batch: int,
    seed: int,
    rate: Callable[[int], float],
    observe: Callable[[int, float, float], None],
) -> None:
    """AdamW in BF16 autocast over float32 weights, no clipping; `observe(step, loss, gradient norm)` after each step."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(0), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        rows = blocks[torch.randint(len(blocks), (batch,), generator=generator)].to(device)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        model.train()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        observe(step, float(loss.detach()), float(gradient))


def series(model: PreTrainedModel, blocks: Tensor, held_out: Tensor, every: int, setting: dict, **run) -> list[dict]:
    """One record every N steps: predicted and measured mismatch in BF16 and FP8 on the same held-out sequence."""
    records: list[dict] = []
    probe = FragilityProbe(model, "bfloat16", v1=False)

    def observe(step: int, loss: float, gradient: float) -> None:
        if step % every:
            return
        one = probe.report(held_out)
        predicted = {"bfloat16": one.predicted, "float8_e4m3": one.at("float8_e4m3").predicted}
        measured = whole_model(model, held_out, ("bfloat16", "float8_e4m3"))
        kappa = max(row["kappa_softmax"] for row in one.rows)
        records.append(
            {"kind": "series", **setting, "step": step, "loss": loss, "kappa_softmax": kappa}
            | {"predicted": predicted, "measured": measured}
        )

    train(model, blocks, observe=observe, **run)
    return records


def blow_up(losses: list[float]) -> int | None:
    """First step of an instability of the loss; see BLOW_UP."""
    best = float("inf")
    for step, loss in enumerate(losses):
        if step >= 10:
            best = min(best, statistics.fmean(losses[step - 10 : step]))
        if not loss < best + BLOW_UP:
            return step
    return None


def error_spike(steps: list[int], errors: list[float]) -> int | None:
    """First step whose mismatch is SPIKE × the median of its past, after eight observations."""
    for i, (step, error) in enumerate(zip(steps, errors, strict=True)):
        if i >= 8 and not error < SPIKE * statistics.median(errors[:i]):
            return step
    return None


class BothKappas(FragilityProbe):
    """κ_softmax of both versions, without v1's conditions of the weights, which take seconds a probe."""

    def report(self, batch) -> FragilityReport:
        self.v1 = True
        return super().report(batch)

    def _read_weights(self, recorder) -> None:
        self.v1 = False
        super()._read_weights(recorder)


class Watch:
    """What is seen of one run every `every` steps: the signals, the BF16 mismatch, and when a controller would have acted.

    The controller gets the risks and norm layers that nothing computes with, so that the run stays as it is.
    """

    def __init__(self, model: PreTrainedModel, held_out: Tensor, every: int):
        self.model, self.held_out, self.every = model, held_out, every
        self.probe = BothKappas(model)
        self.controller = NormEpsilonController()
        self.stand_ins = [[SimpleNamespace(eps=1e-5)] for _ in self.probe.blocks]
        self.signals: dict[str, list[float]] = {name: [] for name in SIGNALS}
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.errors: list[float] = []

    def observe(self, step: int, loss: float, gradient: float) -> None:
        """After each step. Raises Finished ten steps after an instability of the loss."""
        self.losses.append(loss)
        happened = blow_up(self.losses)
        if happened is not None and step >= happened + 10:
            raise Finished
        if step % self.every:
            return
        rows = self.probe.report(self.held_out).rows
        kappas = (max(row[name] for row in rows) for name in ("kappa_softmax", "kappa_softmax_v1"))
        for name, value in zip(SIGNALS, (*kappas, loss, gradient), strict=True):
            self.signals[name].append(value)
        self.controller.observe([row["risk"] for row in rows], self.stand_ins)
        with exact_attention():
            exact = logits(self.model, self.held_out)
        with torch.autocast(exact.device.type, dtype=torch.bfloat16):
            low = logits(self.model, self.held_out)
        self.steps.append(step)
        self.errors.append(distance(low, exact))


def planted(
    blocks: Tensor,
    held_out: Tensor,
    *,
    kind: str,
    ramp: int,
    every: int,
    shape: dict,
    seed: int,
    learning_rate: float,
    steps: int,
    batch: int,
) -> dict:
    """One run, "tuning", "stable" or "ramp": the signals, and where the loss and the error left their past."""
    model = small_gpt2(seed, blocks.shape[1], **shape).to(held_out.device)
    watch = Watch(model, held_out, every)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 20)
        return learning_rate * warm * (RAMP_FACTOR ** max(0, step - ramp) if kind == "ramp" else 1.0)

    with suppress(Finished):
        train(model, blocks, steps, batch, seed, rate, watch.observe)
    record = {"kind": "planted", "run": kind, "seed": seed, "ramp": ramp if kind == "ramp" else None, "every": every}
    record |= {"steps": len(watch.losses), "instability": blow_up(watch.losses)}
    record |= {"error_spike": error_spike(watch.steps, watch.errors), "observed": watch.steps}
    record |= {"signals": watch.signals, "controller_actions": len(watch.controller.actions)}
    return record | {"errors": watch.errors, "losses": watch.losses}


def callback_cost(model: PreTrainedModel, blocks: Tensor, steps: int, batch: int, name: str, every: int) -> dict:
    """Seconds of the callback in a Trainer run at its default cadence, its first and cold probe included."""
    callback = FragilityCallback(every)
    rows = [{"input_ids": row, "labels": row} for row in blocks.cpu()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            bf16=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10 * steps,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        started = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - started
    return {
        "kind": "cost",
        "model": name,
        "steps": steps,
        "batch": batch,
        "length": blocks.shape[1],
        "every": every,
        "probes": len(callback.history),
        "seconds": total,
        "probe_seconds": callback.probe_seconds,
    }
