"""`FragilityCallback`: fragility over the course of `Trainer` training, logged, with an optional warning and controller."""

import inspect
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..stability import EarlyWarning, FragilityReport, NormEpsilonController
from ..stability.fragility import Norms
from ..stability.fragility_risk import Precision, resolve_rest
from .fragility import FragilityProbe
from .reporting import ReportingCallback

logger = logging.getLogger(__name__)

EVERY_N_STEPS = 100
"""Default cadence, meant to cost at most 5 % of the training time; benchmarks/fragility.py measures it."""


class FragilityCallback(ReportingCallback):
    """Probes the model every N optimizer steps with one sequence, and logs what it finds. Changes nothing unless told to.

    The same tokens are probed each time, so that the series shows the weights: `batch`, or the first rows of the first training
    batch. Each log gains, of the latest probe, `fragility/predicted` (Σ risk), `fragility/kappa_softmax` (largest of any layer),
    `fragility/worst_layer`; and of all since the last log `fragility/seconds`; with a warning rule `fragility/warnings` and with a
    controller `fragility/epsilon_actions` (totals). All of this process: nothing is reduced over processes, and a controller is
    refused where there are several. Reporters such as W&B get it too: the callback moves itself in front of them (`reporting`).

    Args:
        every_n_steps: N ≥ 1; the first probe is after step 1, the next after steps N, 2N…
        batch: input ids (B, L) or the model's inputs. None: `sequences` × `max_length` tokens of the first training batch.
        precision, rest, norms: see `fragility_report`.
        v1: also the first version's quantities; they cost seconds a probe.
        early_warning: an `EarlyWarning` that gets the largest κ_softmax of each probe, and whose warnings are logged.
        controller: a `NormEpsilonController`; it changes the norm layers' ε. Call its `restore` to undo that, or leave
            `restore_at_end`. For training in one process only.
        restore_at_end: put ε back when training ends. With False the trained model keeps the raised ε in memory, but no checkpoint
            holds it.
        sequences, max_length: what is taken of the training batch, rows and tokens.
    """

    def __init__(
        self,
        every_n_steps: int = EVERY_N_STEPS,
        batch: Tensor | Mapping[str, Any] | None = None,
        *,
        precision: Precision = "bfloat16",
        rest: Precision | None = None,
        norms: Norms = "exact",
        v1: bool = False,
        early_warning: EarlyWarning | None = None,
        controller: NormEpsilonController | None = None,
        restore_at_end: bool = True,
        sequences: int = 1,
        max_length: int = 512,
    ):
        for name, value in (("every_n_steps", every_n_steps), ("sequences", sequences), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        resolve_rest(precision, rest)
        self.every_n_steps, self.batch = every_n_steps, batch
        self.options: dict[str, Any] = {"precision": precision, "rest": rest, "norms": norms, "v1": v1}
        self.early_warning, self.controller, self.restore_at_end = early_warning, controller, restore_at_end
        self.sequences, self.max_length = sequences, max_length
        self.probe: FragilityProbe | None = None
        self.history: list[tuple[int, FragilityReport]] = []
        self.warned: list[int] = []  # steps
        self.seconds = 0.0  # since the last log
        self.probe_seconds: list[
            float
        ] = []  # of every probe; the first finds the weights' singular vectors and is slower
        self._hook: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.come_first()
        if self.controller is not None and args.world_size > 1:
            raise ValueError(
                f"FragilityCallback(controller=...) needs training in one process, got {args.world_size}: each process probes its "
                "own batch and would raise other layers' ε, so that the replicas become different models. Pass controller=None"
            )
        self.probe = FragilityProbe(model, **self.options)
        if self.batch is None:
            self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, model: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: keep the first rows of the first batch, then go."""
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        if given.get("input_ids") is None:
            return
        self.batch = {
            name: given[name][: self.sequences, : self.max_length].detach().clone()
            for name in ("input_ids", "attention_mask")
            if isinstance(given.get(name), Tensor) and given[name].dim() == 2
        }
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        due = step % self.every_n_steps == 0 or not self.history
        if not due or self.batch is None or self.probe is None:
            return
        device = next(self.probe.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the training step's own work is not the probe's time
        started = time.perf_counter()
        report = self.probe.report(self.batch)
        self.history.append((step, report))
        self._act(step, report)
        spent = time.perf_counter() - started
        self.seconds += spent
        self.probe_seconds.append(spent)

    def _act(self, step: int, report: FragilityReport) -> None:
        kappa = max(row["kappa_softmax"] for row in report.rows)
        if self.early_warning is not None and self.early_warning.observe(kappa):
            self.warned.append(step)
            logger.warning("fragility: κ_softmax %.4g at step %d is above its past", kappa, step)
        if self.controller is not None and self.probe is not None:
            risks = [row["risk"] for row in report.rows]
            raised = self.controller.observe(risks, [block.norms for block in self.probe.blocks])
            if raised:
                logger.warning("fragility: raised the norm layers' ε of layers %s at step %d", raised, step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not self.history:
            return
        _, report = self.history[-1]
        metrics: dict[str, float] = {
            "fragility/predicted": report.predicted,
            "fragility/kappa_softmax": max(row["kappa_softmax"] for row in report.rows),
            "fragility/worst_layer": report.worst_layer,
            "fragility/seconds": round(self.seconds, 6),
        }
        if self.early_warning is not None:
            metrics["fragility/warnings"] = len(self.warned)
        if self.controller is not None:
            metrics["fragility/epsilon_actions"] = len(self.controller.actions)
        self.seconds = 0.0
        self.add_metrics(state, logs, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self._unhook()
        if self.controller is not None and self.restore_at_end:
            self.controller.restore()

    def heat_map(self, path: str | Path, quantity: str = "risk") -> None:
        """Write a figure of a quantity of the rows over layers and steps; needs matplotlib (extra `plot`).

        Raises:
            ValueError: no probe yet, or a quantity the rows do not have as a number.
        """
        from ..stability.fragility_plot import heat_map

        for _, report in self.history[:1]:
            numbers = [name for name, value in report.rows[0].items() if isinstance(value, float)]
            if quantity not in numbers:
                raise ValueError(f"quantity must be one of {', '.join(numbers)}, got {quantity!r}")
        values = [[row[quantity] for row in report.rows] for _, report in self.history]
        heat_map([step for step, _ in self.history], values, path, quantity)
