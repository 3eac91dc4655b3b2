"""`hf-geoscale finetune`: one run of `Trainer`, with FP8 attention or without, and everything it measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
from transformers.utils import logging

from ..config import GeoScaleConfig
from ..integrations import GeoScaleCallback, patch_model
from ..integrations.callback import SCHEDULED_HEADROOM
from .failures import InputError
from .loading import check_length, load_model, load_tokenizer, read_text, token_blocks
from .loss_plot import plot_possible
from .progress import StepProgress
from .results import read_baseline
from .run import Run, carry_out
from .run_folder import (
    Settings,
    check_output,
    checkpoint_step,
    earlier_results,
    last_whole_checkpoint,
    prepare_output,
    set_aside,
)
from .stopping import StopOnSignal


@dataclass(frozen=True)
class Options:
    """Options that may differ when a run is resumed."""

    save_steps: int = 0
    resume: bool = False
    overwrite: bool = False
    save_model: bool = True
    baseline: Path | None = None


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


def data_sets(settings: Settings, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], list[dict]]:
    """(training, held-out) sequences; the held-out ones come after all training text.

    A text with fewer sequences than the steps need is gone over again; it must give one beyond the held-out ones.
    """
    available = len(tokenizer(text, verbose=False).input_ids) // settings.length
    needed = settings.steps * settings.batch_size + settings.eval_sequences
    count = max(min(needed, available), settings.eval_sequences + 1)
    blocks = [{"input_ids": block, "labels": block} for block in token_blocks(tokenizer, text, settings.length, count)]
    return blocks[: -settings.eval_sequences], blocks[-settings.eval_sequences :]


def build_trainer(settings: Settings, output: Path, save_steps: int, stop: StopOnSignal, console: Console) -> Trainer:
    """Model, data and callbacks; the model is patched when the settings ask for FP8. Text is read first: it is quicker."""
    text = read_text(settings.text, settings.dataset, settings.column, settings.split)
    in_fp8 = settings.scaling == "geometry"
    with console.status(f"Loading {settings.model}"):
        tokenizer = load_tokenizer(settings.model)
        train, held_out = data_sets(settings, text, tokenizer)
        model = load_model(settings.model, in_fp8, "; --scaling none trains it without FP8 attention")
    logging.set_verbosity_error()
    check_length(model.config, settings.length)
    callbacks: list[TrainerCallback] = [StepProgress(settings.steps, console), stop]
    if in_fp8:
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


def has_ended(settings: Settings, output: Path, save_model: bool, console: Console) -> bool:
    """Whether an earlier run has ended, which is then printed.

    Raises:
        InputError: it diverged, or its weights are gone.
    """
    ended = earlier_results(output)
    if ended is None or ended.outcome in ("interrupted", "failed"):
        return False
    if ended.outcome == "diverged":
        raise InputError(
            f"{output} {ended.ending}, and going on would repeat it; --overwrite with a lower --learning-rate"
        )
    if not save_model or (output / "model").is_dir():
        console.print(f"{output} is finished: all {settings.steps} steps are done, nothing to do", soft_wrap=True)
        return True
    last, _ = last_whole_checkpoint(output, settings.steps)
    if last is None or checkpoint_step(last) < settings.steps:
        raise InputError(
            f"{output} is finished, but its model was not written, and no checkpoint of step {settings.steps} holds it; "
            "--no-save-model does without, --overwrite trains again"
        )
    return False


def resume_from(output: Path, steps: int, console: Console) -> Path | None:
    """The last whole checkpoint. Others are set aside, which is printed, as is a lack of whole ones."""
    last, skipped = last_whole_checkpoint(output, steps)
    for checkpoint, problem in skipped.items():
        set_aside(checkpoint)
        console.print(f"{checkpoint.name} is not whole, and was set aside: {problem}", soft_wrap=True)
    if last is None:
        console.print(f"{output} holds no whole checkpoint: the run starts anew", soft_wrap=True)
    return last


def finetune_model(settings: Settings, output: Path, options: Options, console: Console) -> int:
    """Fine-tune, evaluate before and after on held-out text, write metrics, card, plot and model into `output`.

    Returns:
        The command's exit status: 0, or 128 + the signal that interrupted it.
    Raises:
        InputError, UnsupportedModelError: unusable settings, model, text, baseline or output folder. The message names the remedy.
        RunError: the run diverged, or a file could not be written. Earlier measurements are in `output`.
    """
    baseline = None if options.baseline is None else read_baseline(options.baseline, asdict(settings))
    check_output(settings, output, options.resume, options.overwrite)
    if options.resume and has_ended(settings, output, options.save_model, console):
        return 0
    with_plot = plot_possible(console)
    stop = StopOnSignal()
    trainer = build_trainer(settings, output, options.save_steps, stop, console)
    prepare_output(settings, output, options.resume)
    checkpoint = resume_from(output, settings.steps, console) if options.resume else None
    start = f"resuming from {checkpoint.name}" if checkpoint else "from the start"
    console.print(
        f"Fine-tuning {settings.model}, scaling {settings.scaling}, {settings.steps} steps, {start}", soft_wrap=True
    )
    before = loss_before(trainer, output, checkpoint is not None)
    run = Run(settings, output, trainer, before, baseline, with_plot, console)
    progress = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepProgress))
    try:
        return carry_out(run, checkpoint, stop, options.save_model)
    finally:
        progress.bar.stop()
