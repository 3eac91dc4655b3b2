"""Training runs for the fragility benchmark: series of predictor and mismatch, planted instabilities, the callback's cost."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from fragility_measure import distance, exact_attention, logits, whole_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

from hf_geoscale import EarlyWarning, FragilityCallback
from hf_geoscale.integrations.fragility import FragilityProbe

RAMP_FACTOR = 1.12
"""Factor on the learning rate a step, once the ramp has begun: 10 × in 20 steps."""

BLOW_UP = 0.7
"""Nats by which a step's loss must exceed the least mean of ten successive losses so far to count as an instability."""

SPIKE = 2.0
"""Times the median of its past at which a BF16 mismatch counts as an error spike."""

RULE = {"span": 4, "warm_up": 24, "memory": 32, "ratio": 2.0}
"""`EarlyWarning`'s defaults, spelt out: chosen on runs of a smaller GPT-2 with seeds 10 and 11, before any of these."""


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


class Watch:
    """What is seen of one run: κ_softmax and the BF16 mismatch every `every` steps, and where each rule warned.

    The rivals' rules, on the loss and on the gradient norm, look at the same steps.
    """

    def __init__(self, model: PreTrainedModel, held_out: Tensor, every: int):
        self.model, self.held_out, self.every = model, held_out, every
        self.probe = FragilityProbe(model, v1=False)
        self.rules = {name: EarlyWarning(**RULE) for name in ("κ_softmax", "loss", "gradient norm")}
        self.warned: dict[str, list[int]] = {name: [] for name in self.rules}
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.errors: list[float] = []
        self.kappas: list[float] = []

    def observe(self, step: int, loss: float, gradient: float) -> None:
        """After each step. Raises Finished ten steps after an instability of the loss."""
        self.losses.append(loss)
        happened = blow_up(self.losses)
        if happened is not None and step >= happened + 10:
            raise Finished
        if step % self.every:
            return
        kappa = max(row["kappa_softmax"] for row in self.probe.report(self.held_out).rows)
        for name, value in (("κ_softmax", kappa), ("loss", loss), ("gradient norm", gradient)):
            if self.rules[name].observe(value):
                self.warned[name].append(step)
        with exact_attention():
            exact = logits(self.model, self.held_out)
        with torch.autocast(exact.device.type, dtype=torch.bfloat16):
            low = logits(self.model, self.held_out)
        self.steps.append(step)
        self.errors.append(distance(low, exact))
        self.kappas.append(kappa)


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
    """One run, "stable" or "ramp": where the loss and the error left their past, and where each rule warned."""
    model = small_gpt2(seed, blocks.shape[1], **shape).to(held_out.device)
    watch = Watch(model, held_out, every)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 20)
        return learning_rate * warm * (RAMP_FACTOR ** max(0, step - ramp) if kind == "ramp" else 1.0)

    with suppress(Finished):
        train(model, blocks, steps, batch, seed, rate, watch.observe)
    record = {"kind": "planted", "run": kind, "seed": seed, "ramp": ramp if kind == "ramp" else None, "every": every}
    record |= {"steps": len(watch.losses), "instability": blow_up(watch.losses)}
    record |= {"error_spike": error_spike(watch.steps, watch.errors), "warned": watch.warned, "observed": watch.steps}
    return record | {"errors": watch.errors, "kappa_softmax": watch.kappas, "losses": watch.losses}


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
