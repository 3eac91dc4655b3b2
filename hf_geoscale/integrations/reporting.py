"""Callbacks whose metrics every reporter gets: TensorBoard, W&B and the rest run in front of a user's callbacks.

A `TrainerCallback` is handed logs, but neither the Trainer nor the list of callbacks. The seam is the call stack: an event of a
callback runs inside a method of the Trainer that lists the callback in `callback_handler.callbacks`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback

RUNTIME = "_runtime"
"""What the log of an evaluation ends one of its names with, behind its prefix (transformers' `speed_metrics`)."""


class ReportingCallback(TrainerCallback):
    """Moves itself in front of the reporters when the Trainer is made and when training begins, and adds metrics to logs."""

    def attach(self, trainer: Any) -> Any:
        """Put this callback in front of the trainer's reporters, adding it if it is not there; returns it."""
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            callbacks.append(self)
        self._move(callbacks)
        return self

    def _move(self, callbacks: list) -> None:
        """Move this callback in front of all that are none of ours.

        In a loop over the list that has come to this callback, none is skipped or called twice: those it passes move one place on,
        up to where it was.
        """
        place = callbacks.index(self)
        first = next(
            i for i, callback in enumerate(callbacks) if not isinstance(callback, ReportingCallback) or i == place
        )
        callbacks.insert(first, callbacks.pop(place))

    def calling_trainer(self) -> Any:
        """The Trainer whose event this is, or None where no Trainer on the call stack lists this callback."""
        frame = sys._getframe(1)
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer):
                handler = getattr(caller, "callback_handler", None)
                if handler is not None and any(callback is self for callback in handler.callbacks):
                    return caller
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def come_first(self) -> Any:
        """Move in front of the reporters of the Trainer whose event this is, and return it; None if it is not found."""
        trainer = self.calling_trainer()
        if trainer is not None:
            self._move(trainer.callback_handler.callbacks)
        return trainer

    def on_init_end(self, args, state, control, **kwargs):
        self.come_first()

    def on_train_begin(self, args, state, control, **kwargs):
        self.come_first()

    @staticmethod
    def add_metrics(state: Any, logs: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Add metrics to a log that is going to the reporters, and to the history, which has its copy by now."""
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)


def evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """Prefix of the names in an evaluation's log, "eval" or what the caller chose; None for a log of training."""
    prefixes = [name.removesuffix(RUNTIME) for name in logs if name.endswith(RUNTIME)]
    prefix = min(prefixes, key=len, default="train")
    return None if prefix == "train" else prefix
