"""`GeoScaleCallback`: keep the scales fresh during `Trainer` training, and log what they saw."""

import logging
import math
import time

import torch
from torch import nn
from transformers import TrainerCallback

from ..config import GeoScaleConfig
from .layer import GeoScaleLayer
from .patched import geoscale_layers, patched_layers
from .patching import patch_model
from .scales import refresh_scales

logger = logging.getLogger(__name__)

SCHEDULED_HEADROOM = 4.0
"""Headroom the callback patches with when it refreshes every N > 1 steps; accuracy is the same up to 64 (docs/model_error.md)."""


def adam_step_bound(optimizer, weight_amax: float, weight_epsilon: float) -> float | None:
    """Largest movement of any one weight in an Adam or AdamW step, or None for an optimizer without such a bound.

    By Cauchy–Schwarz |m̂|/√v̂ ≤ (1 − β₁) / √((1 − β₂)(1 − β₁²/β₂)) when β₁² < β₂ (7.3 for 0.9 and 0.999; Kingma & Ba's 3.2
    holds for a single spike only), plus weight decay, plus half a unit in the last place of the stored weight.

    Args:
        weight_amax: largest |weight|. weight_epsilon: spacing at 1 of the weights' dtype.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return None
    bounds = []
    for group in optimizer.param_groups:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        if group["amsgrad"] or not beta1**2 < beta2:
            return None
        ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        # Decay that is not decoupled is added to the gradient, which the ratio already covers.
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        bounds.append(lr * (ratio + decoupled * group["weight_decay"] * weight_amax))
    return max(bounds) + weight_amax * weight_epsilon / 2


class GeoScaleCallback(TrainerCallback):
    """Refreshes the scales when training begins, every N optimizer steps before the next forward, and when it ends.

    Patches the model if nobody did. With N > 1 the certificates must also cover the weights' drift: it is bounded from the
    optimizer's learning rate, and the refresh comes early when it could use up the headroom (each step for an optimizer
    other than Adam or AdamW). State lives on the modules, so resuming needs nothing from here.

    Each log gains `geoscale/utilisation` (worst entry/certificate since the last log), `geoscale/overflows` (total so far),
    `geoscale/sigma_drift` (largest relative change of a head's σ at the last refresh) and `geoscale/refresh_seconds` (since
    the last log, without the forwards in which layers sharded by FSDP2 measure themselves), all of this process: nothing is
    reduced over processes. Reporters such as W&B run before user callbacks: `attach(trainer)` puts this one first.

    Args:
        every_n_steps: N ≥ 1, optimizer steps between refreshes.
        config: used only when the model is not patched yet.
    """

    def __init__(self, every_n_steps: int = 1, config: GeoScaleConfig | None = None):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.config = config or GeoScaleConfig(headroom=SCHEDULED_HEADROOM if every_n_steps > 1 else 1.0)
        self.layers: list[GeoScaleLayer] = []
        self.steps = 0  # since the last refresh
        self.drift = 0.0  # bound of any weight's movement since then
        self.seconds = 0.0  # spent on refreshes since the last log
        self.calls_before: dict[int, int] | None = None  # calls by layer when training began
        self.overflows = 0

    def attach(self, trainer) -> "GeoScaleCallback":
        """Add this callback ahead of the trainer's reporters, so that they receive the metrics too; returns it.

        A reference model that the trainer holds (TRL's `ref_model`) is patched like the trained one, so that the two sets of
        log-probabilities compared by the loss have the same numerics.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        else:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        callbacks.insert(0, self)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            patch_model(trainer.accelerator.unwrap_model(reference), patched_layers(trainer.model)[0].config)
        return self

    def _refresh(self, model: nn.Module) -> None:
        started = time.perf_counter()
        refresh_scales(model)
        self.layers = geoscale_layers(model)
        self.steps, self.drift = 0, 0.0
        self.seconds += time.perf_counter() - started

    def _step_drift(self, optimizer) -> float:
        """Bound of what this step moved any weight by, from what was measured: the same on every process."""
        amax = max((layer.weight_amax for layer in self.layers), default=0.0)
        epsilon = max((layer.weight_epsilon for layer in self.layers), default=0.0)
        moved = adam_step_bound(optimizer, amax, epsilon)
        if moved is None:
            return math.inf
        # FSDP2 may have rounded the measured weights when it gathered them: another half unit in the last place, once.
        return moved + (amax * epsilon / 2 if self.steps == 1 else 0.0)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None and not patched_layers(model):
            patch_model(model, self.config)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._refresh(model)
        self.calls_before = {layer.site.layer: layer.calls + layer.delegated.total() for layer in self.layers}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.steps += 1
        due = self.steps >= self.every_n_steps
        if not due:
            self.drift += self._step_drift(optimizer)
            due = self.drift > min((layer.max_weight_drift for layer in self.layers), default=math.inf)
        if due:
            self._refresh(model)
        else:
            for layer in self.layers:
                layer.accept_drift()

    def on_step_end(self, args, state, control, **kwargs):
        before, self.calls_before = self.calls_before, None
        if before is None:
            return
        idle = [
            layer.site.layer
            for layer in self.layers
            if layer.calls + layer.delegated.total() == before[layer.site.layer]
        ]
        if idle:
            logger.warning(
                "geoscale: layers %s are patched but their attention never ran through the attention interface; another "
                "library may have replaced their forward, so they train without FP8",
                idle,
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not self.layers:
            return
        used = [u for u in (layer.drain_utilisation() for layer in self.layers) if u is not None]
        overflows = sum(layer.statistics.overflows for layer in self.layers)
        metrics = {
            "geoscale/overflows": overflows,
            "geoscale/sigma_drift": max(float(layer.sigma_drift) for layer in self.layers),
            "geoscale/refresh_seconds": round(self.seconds, 6),
        }
        if used:
            metrics["geoscale/utilisation"] = max(used)
        self.seconds = 0.0
        if overflows > self.overflows:
            self.overflows = overflows
            config = self.layers[0].config
            certified = config.scaling == "geometry" and config.bound == "certified"
            exceeded = any(
                count
                for layer in self.layers
                for operand, count in layer.statistics.overflows_by_operand.items()
                if operand != "logit gradient"
            )
            reason = f"scaling={config.scaling!r}, bound={config.bound!r} excludes none"
            if certified and exceeded:
                reason = "a certificate was exceeded, please report it"
            elif certified:  # no finite dO overflows dS8: docs/numerics.md
                reason = "only of gradients that came in as Inf or NaN, in steps that fp16's GradScaler skips"
            logger.warning("geoscale: %d FP8 overflows so far; %s", self.overflows, reason)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._refresh(model)
        if self.layers:
            self.layers[0].group.settle(self.layers)  # no later refresh will look for NaN
