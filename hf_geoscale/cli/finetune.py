"""`hf-geoscale finetune`: one run of `Trainer`, with FP8 attention or without, and everything it measured."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..config import GeoScaleConfig
from ..integrations import GeoScaleCallback, geometry_report, patch_model
from ..integrations.callback import SCHEDULED_HEADROOM
from .loading import load, read_text, token_blocks
from .progress import StepProgress
from .results import RunMetrics, check_comparable, print_summary, write_results


@dataclass(frozen=True)
class Settings:
    """What decides a run's losses. A resumed run must have the same."""

    model: str
    text: str | None = None
    dataset: str | None = None
    column: str = "text"
    scaling: Literal["geometry", "none"] = "geometry"
    precision: Literal["standard", "high"] = "standard"
    every_n_steps: int = 1
    steps: int = 40
    length: int = 256
    batch_size: int = 1
    learning_rate: float = 5e-5
    dtype: str = "float32"
    eval_sequences: int = 4
    seed: int = 0


def check_output(settings: Settings, output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to touch an earlier run that nobody asked to resume or replace.

    Raises:
        ValueError: something else is in the folder; or an earlier run, and neither --resume nor --overwrite was given, or it
            had other settings.
    """
    record = output / "settings.json"
    if not record.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no run of ours; choose another folder")
        return
    if overwrite and not resume:
        return
    if not resume:
        raise ValueError(f"{output} holds an earlier run; add --resume to go on with it or --overwrite to replace it")
    old = json.loads(record.read_text())
    changed = {key: (old.get(key), value) for key, value in asdict(settings).items() if old.get(key) != value}
    if changed:
        raise ValueError(f"{output} was started with other settings, (old, new): {changed}")


def prepare_output(settings: Settings, output: Path, resume: bool) -> str | None:
    """Record the settings, drop a replaced run, and return the checkpoint to resume from, if any."""
    checkpoints = output / "checkpoints"
    if not resume:
        for name in ("checkpoints", "model"):
            shutil.rmtree(output / name, ignore_errors=True)
        (output / "metrics.json").unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    return get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None


def training_arguments(settings: Settings, output: Path, save_steps: int) -> TrainingArguments:
    """One log a step; NaN losses are shown, not hidden; data order and dropout follow the seed."""
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, settings.steps // 10),
        bf16=settings.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or settings.steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


def data_sets(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], list[dict]]:
    """(training, held-out) sequences; the held-out ones come after all training text.

    A text with fewer sequences than the steps need is gone over again; it must give one beyond the held-out ones.
    """
    text = read_text(settings.text, settings.dataset, settings.column)
    available = len(tokenizer(text, verbose=False).input_ids) // settings.length
    needed = settings.steps * settings.batch_size + settings.eval_sequences
    count = max(min(needed, available), settings.eval_sequences + 1)
    blocks = [{"input_ids": block, "labels": block} for block in token_blocks(tokenizer, text, settings.length, count)]
    return blocks[: -settings.eval_sequences], blocks[-settings.eval_sequences :]


def build_trainer(settings: Settings, output: Path, save_steps: int, console: Console) -> Trainer:
    """Model, data and callbacks; the model is patched when the settings ask for FP8."""
    with console.status(f"Loading {settings.model}"):
        model, tokenizer = load(settings.model)
    train, held_out = data_sets(settings, tokenizer)
    callbacks: list[TrainerCallback] = [StepProgress(settings.steps, console)]
    if settings.scaling == "geometry":
        headroom = SCHEDULED_HEADROOM if settings.every_n_steps > 1 else 1.0
        patch_model(model, GeoScaleConfig(headroom=headroom, precision=settings.precision))
        callbacks.insert(0, GeoScaleCallback(settings.every_n_steps))
    trainer = Trainer(
        model=model,
        args=training_arguments(settings, output, save_steps),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def loss_before(trainer: Trainer, output: Path, resumed: bool) -> float:
    """Held-out loss before the first step, kept in a file for runs that are resumed."""
    record = output / "eval_before.json"
    if resumed and record.exists():
        return json.loads(record.read_text())["eval_loss"]
    loss = trainer.evaluate()["eval_loss"]
    record.write_text(json.dumps({"eval_loss": loss}) + "\n")
    return loss


def finetune_model(
    settings: Settings,
    output: Path,
    save_steps: int,
    resume: bool,
    overwrite: bool,
    save_model: bool,
    baseline: Path | None,
    console: Console,
) -> RunMetrics:
    """Fine-tune, evaluate before and after on held-out text, write metrics, plot, card and model into `output`.

    Raises:
        ValueError, OSError: unusable settings, model, text, baseline or output folder; each says what to do.
        ImportError: the plot extra is missing.
    """
    import matplotlib  # noqa: F401  the plot needs it (extra: plot); say so before training, not after

    compared = None if baseline is None else RunMetrics.read(baseline)
    if compared is not None:
        check_comparable(asdict(settings), compared.settings)
    check_output(settings, output, resume, overwrite)
    logging.set_verbosity_error()
    trainer = build_trainer(settings, output, save_steps, console)
    checkpoint = prepare_output(settings, output, resume)
    start = f"resuming from {Path(checkpoint).name}" if checkpoint else "from the start"
    console.print(f"Fine-tuning {settings.model}, scaling {settings.scaling}, {settings.steps} steps, {start}")
    before = loss_before(trainer, output, bool(checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"]
    report = geometry_report(trainer.model) if settings.scaling == "geometry" else None
    metrics = RunMetrics.collect(asdict(settings), trainer.state.log_history, before, after, report)
    if save_model:
        trainer.save_model(str(output / "model"))
    write_results(metrics, compared, output)
    print_summary(metrics, compared, output, console)
    return metrics
