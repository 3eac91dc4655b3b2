"""The folder of a fine-tuning run: its owner, its contents, and the checkpoint to go on from."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .failures import InputError
from .results import RunMetrics, write_whole
from .weight_files import file_problem, weights_problem

SET_ASIDE = "incomplete-"
"""Prefix of a checkpoint that is not whole."""

TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@dataclass(frozen=True)
class Settings:
    """Settings that decide a run's losses. A resumed run must have the same."""

    model: str
    text: str | None = None
    dataset: str | None = None
    column: str = "text"
    split: str = "train"
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


def check_folder(output: Path) -> None:
    """Raise InputError, naming it, unless a folder can be written to, or made."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file, and --output {output} needs a folder; choose another")
    if not os.access(existing, os.W_OK):
        raise InputError(f"{existing} cannot be written to; choose another --output")


def check_output(settings: Settings, output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to touch an earlier run that nobody asked to resume or replace.

    Raises:
        InputError: no folder can be made there; something else is in it; or an earlier run, and neither --resume nor --overwrite
            was given, or it had other settings.
    """
    check_folder(output)
    record = output / "settings.json"
    if not record.exists():
        if output.exists() and any(output.iterdir()):
            raise InputError(f"{output} is not empty and holds no run of ours; choose another folder")
        return
    if overwrite and not resume:
        return
    if not resume:
        raise InputError(f"{output} holds an earlier run; add --resume to go on with it or --overwrite to replace it")
    try:
        old = {field.name: field.default for field in fields(Settings)} | json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise InputError(f"{record} cannot be read ({error}); --overwrite starts anew") from error
    changed = {key: (old.get(key), value) for key, value in asdict(settings).items() if old.get(key) != value}
    if changed:
        raise InputError(f"{output} was started with other settings, (old, new): {changed}")


def earlier_results(output: Path) -> RunMetrics | None:
    """Metrics of a run that ended in some way; None where there are none, or they cannot be read."""
    try:
        return RunMetrics.read(output)
    except InputError:
        return None


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it, by its trainer_state.json. Raises ValueError or OSError."""
    state: Any = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ValueError("no global_step")
    return state["global_step"]


def checkpoint_problem(checkpoint: Path, steps: int) -> str | None:
    """Why a checkpoint is not whole: the file and its fault; None for a checkpoint to go on from.

    Args:
        steps: of the whole run; after the last of them optimizer, schedule and random numbers are not needed.
    """
    try:
        done = checkpoint_step(checkpoint)
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, OSError) as error:
        return f"trainer_state.json is damaged ({error})"
    if (problem := weights_problem(checkpoint)) is not None:
        return problem
    needed = TRAINING_STATE if done < steps else ()
    return next((p for p in (file_problem(checkpoint / name) for name in needed) if p is not None), None)


def last_whole_checkpoint(output: Path, steps: int) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and those that are not whole, each with the reason."""
    folder = output / "checkpoints"
    found: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and number.isdecimal():
            found[int(number)] = path
    skipped: dict[Path, str] = {}
    last = None
    for _, path in sorted(found.items(), reverse=True):
        problem = checkpoint_problem(path, steps)
        if problem is None:
            last = path if last is None else last
            continue
        skipped[path] = problem
    return last, skipped


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that the Trainer, which counts and removes its own, leaves it alone."""
    aside = checkpoint.with_name(f"{SET_ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def prepare_output(settings: Settings, output: Path, resume: bool) -> None:
    """Record the settings, and drop a run that is replaced."""
    if not resume:
        for name in ("checkpoints", "model", "model.unfinished"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ("metrics.json", "metrics.csv", "loss.png", "README.md", "eval_before.json"):
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")
