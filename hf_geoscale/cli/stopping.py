"""Ctrl-C and SIGTERM during training: stop at the end of the step, with a checkpoint."""

import os
import signal
import threading
from typing import Any, Literal

from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"\nStopping at the end of this step, with a checkpoint. Once more stops at once.\n"
FINISHING = b"\nTraining is over, and its results are being written. Once more stops at once, without them.\n"


class StopOnSignal(TrainerCallback):
    """As a context, turns the first SIGINT or SIGTERM during training into a checkpoint and an orderly end.

    One after training lets the results be written. A second one, or one before training, raises KeyboardInterrupt. Without effect
    outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.phase: Literal["before", "training", "after"] = "before"
        self.handlers: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _received(self, number: int, _: Any) -> None:
        again, self.signal = self.signal is not None, number
        if again or self.phase == "before":
            raise KeyboardInterrupt
        os.write(2, STOPPING if self.phase == "training" else FINISHING)  # the signal may have interrupted a print

    def on_train_begin(self, args, state, control, **kwargs):
        self.phase = "training"

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal is not None:
            control.should_training_stop = True
            control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        self.phase = "after"
