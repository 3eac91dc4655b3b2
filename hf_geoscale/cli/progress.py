"""Progress bar and step times of a training run."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class StepProgress(TrainerCallback):
    """A bar with the current loss; adds `step_seconds` (wall clock of the step, refresh included) to each log.

    Where the output is no terminal, one plain line every tenth of the run instead of a bar.
    """

    def __init__(self, steps: int, console: Console):
        self.console = console
        self.started = 0.0
        self.seconds = 0.0
        self.every = max(1, steps // 10)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, status="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)
        self.bar.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        logs["step_seconds"] = state.log_history[-1]["step_seconds"] = round(self.seconds, 4)
        status = f"loss {logs['loss']:.4f}  {self.seconds:.2f} s/step"
        if "geoscale/overflows" in logs:
            status += f"  overflows {logs['geoscale/overflows']}"
        self.bar.update(self.task, completed=state.global_step, status=status)
        if not self.console.is_terminal and (state.global_step % self.every == 0 or state.global_step == 1):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {status}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()
