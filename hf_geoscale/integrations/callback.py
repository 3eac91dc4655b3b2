"""`GeoScaleCallback`: keep the scales fresh during `Trainer` training, and log what they saw."""

import logging
import math
import time
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..config import GeoScaleConfig, resolve_config
from ..errors import UnsupportedModelError
from .layer import GeoScaleLayer
from .metrics import cause_of_overflows, evaluation_metrics, training_metrics
from .patched import geoscale_layers, outermost_models, patched_layers
from .patching import patch_model
from .reporting import ReportingCallback, evaluation_prefix
from .scales import refresh_scales
from .sharding import is_partitioned

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


class GeoScaleCallback(ReportingCallback):
    """Patches the model, keeps its scales fresh while a Trainer trains it, and logs what its calls saw.

        >>> trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[GeoScaleCallback(precision="high")])

    Scales are refreshed when training begins, at the end of every N-th step, and when training ends. With N > 1 certificates must
    also cover how far the weights move in between. The optimizer's learning rate bounds that, and a refresh comes early where the
    headroom could be used up: each step for an optimizer other than Adam or AdamW. State lives on the modules, so resuming a run
    needs nothing of this object.

    A model that is not patched is patched when the Trainer is made. Two kinds are patched when training begins: models that
    `model_init` makes, and those of a Trainer that got this callback later, by `trainer.add_callback`. A reference model of the
    trainer (TRL's `ref_model`) is patched like the trained one: a loss that compares the two needs the same numerics in both.

    Logs of training gain these names:

    - `geoscale/utilisation`: worst entry / certificate since the last log; `geoscale/utilisation_layer`: the layer it is of.
    - `geoscale/overflows`: total so far. `geoscale/fallback_calls`: calls on SDPA so far, where there are any.
    - `geoscale/sigma_drift`: largest relative change of a head's certificate at the last refresh, 0 while weights rest
      (`observations.certificate_drift`); `geoscale/sigma_drift_layer`: the layer it is of, unless it is 0.
    - `geoscale/refresh_seconds`: since the last log, without forwards in which layers sharded by FSDP2 measure themselves.
    - `geoscale/kernels`: what ran the calls; in the first log, in the last one, and after a change.

    An evaluation's log gains `eval_geoscale/utilisation` and `eval_geoscale/overflows` of its own forwards, with the prefix of its
    other names. The metrics of `predict` gain them too. A hyperparameter search gets `evaluate`'s metrics without them, since its
    default objective adds up all metrics. Counts and maxima are of this process: nothing is reduced over processes. TensorBoard,
    W&B and other reporters get all of this, since the callback moves itself in front of them (`reporting`).

    Args:
        every_n_steps: N ≥ 1, optimizer steps between refreshes.
        config: as `patch_model` takes it. None: `GeoScaleConfig()`, with headroom `SCHEDULED_HEADROOM` for N > 1.
        **overrides: fields of the config, as `patch_model` takes them.
    Raises:
        TypeError: an N that is no integer, or an override that is no field of the config.
        ValueError: N < 1, or a bad value of a field.
    """

    def __init__(self, every_n_steps: int = 1, config: GeoScaleConfig | None = None, **overrides: Any):
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool):
            raise TypeError(
                f"every_n_steps must be an int, got {every_n_steps!r}; what patch_model takes goes by name: "
                'GeoScaleCallback(config=...) or GeoScaleCallback(precision="high")'
            )
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        default = GeoScaleConfig(headroom=SCHEDULED_HEADROOM if every_n_steps > 1 else 1.0)
        self.config = resolve_config(default if config is None else config, overrides, "GeoScaleCallback")
        given = [field.name for field in fields(GeoScaleConfig)] if config is not None else overrides
        self.asked = {name: getattr(self.config, name) for name in given}  # what a patched model is compared with
        self.begun = False  # a run
        self.layers: list[GeoScaleLayer] = []  # of the model in training
        self.steps = 0  # since the last refresh
        self.drift = 0.0  # bound of any weight's movement since then
        self.due = False  # whether the next step's end refreshes
        self.seconds = 0.0  # spent on refreshes since the last log
        self.calls_before: dict[int, int] | None = None  # calls by layer when training began
        self.overflows = 0
        self.kernels: str | None = None  # as logged last
        self._said: set[Any] = set()  # warnings that were given

    def __repr__(self) -> str:
        default = GeoScaleConfig()
        changed = {f.name: getattr(self.config, f.name) for f in fields(GeoScaleConfig)}
        shown = {name: value for name, value in changed.items() if value != getattr(default, name)}
        arguments = {"every_n_steps": self.every_n_steps} | shown
        return f"GeoScaleCallback({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    def attach(self, trainer: Any) -> "GeoScaleCallback":
        """Patch the trainer's model now, and add this callback in front of its reporters; returns it.

        What `callbacks=[…]` does by itself. Needed where neither that is possible nor patching when training begins: after the
        Trainer was made, with DeepSpeed ZeRO-3, or to evaluate in FP8 before training.
        """
        super().attach(trainer)
        self._patch(trainer.model)
        self._patch_reference(trainer)
        return self

    def _warn_once(self, key: Any, message: str, *arguments: Any) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning(message, *arguments)

    def _patch(self, model: nn.Module) -> None:
        """Patch a model, or compare what it was patched with."""
        patched = patched_layers(model)
        if not patched:
            patch_model(model, self.config)  # type: ignore[arg-type]
            return
        held = patched[0].config
        differences = [name for name, value in self.asked.items() if getattr(held, name) != value]
        if differences:
            mine, theirs = (
                ", ".join(f"{name}={getattr(config, name)!r}" for name in differences) for config in (self.config, held)
            )
            self._warn_once(
                (held, "differs"),
                "geoscale: the model was patched before with %s, which holds. GeoScaleCallback's %s does not: give one of the two",
                theirs,
                mine,
            )
        if self.every_n_steps > 1 and held.headroom == 1:
            self._warn_once(
                (held, "no headroom"),
                "geoscale: the model was patched with headroom=1, which leaves no room for weights to move, so its scales are "
                "refreshed every step and not every %d; patch_model(model, headroom=%g)",
                self.every_n_steps,
                SCHEDULED_HEADROOM,
            )

    def _patch_reference(self, trainer: Any) -> None:
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            for inner in outermost_models(
                reference
            ):  # accelerate's unwrap_model keeps torch.compile's wrapper in some releases
                patch_model(inner, patched_layers(trainer.model)[0].config)

    def _patch_late(self, model: nn.Module, trainer: Any) -> None:
        """Patch when training begins: a model of `model_init`, or of a trainer that was made without this callback.

        Raises:
            UnsupportedModelError: DeepSpeed ZeRO-3 has partitioned it by now.
        """
        if not patched_layers(model) and any(map(is_partitioned, model.parameters())):
            made = getattr(trainer, "model_init", None) is not None
            line = (
                "return patch_model(model) at the end of model_init" if made else "GeoScaleCallback().attach(trainer)"
            )
            before = "instead" if made else "before trainer.train()"
            raise UnsupportedModelError(
                "GeoScaleCallback comes too late: DeepSpeed ZeRO-3 has partitioned the model, which has to be patched before that. "
                f"Add this line {before}: {line}"
            )
        self._patch(model)

    def _refresh(self, model: nn.Module) -> None:
        started = time.perf_counter()
        refresh_scales(model)
        self.layers = geoscale_layers(model)
        self.steps, self.drift, self.due = 0, 0.0, False
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
        self.come_first()
        if model is not None:
            self._patch(model)

    def _begin(self, model: nn.Module) -> None:
        """Start over with the model of a run."""
        self.begun = True
        trainer = self.come_first()
        self._patch_late(model, trainer)
        if trainer is not None:
            self._patch_reference(trainer)
        self._refresh(model)
        self.calls_before = {layer.site.layer: layer.calls + layer.delegated.total() for layer in self.layers}
        self.overflows, self.kernels = sum(layer.statistics.overflows for layer in self.layers), None
        for layer in self.layers:  # what came before training is no part of its logs
            layer.drain_utilisation(training=True)
            layer.drain_utilisation(training=False)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._begin(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.begun:  # added in the middle of training
            self._begin(model)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.steps += 1
        due = self.steps >= self.every_n_steps
        if not due:
            self.drift += self._step_drift(optimizer)
            due = self.drift > min((layer.max_weight_drift for layer in self.layers), default=math.inf)
        self.due = due
        if not due:
            for layer in self.layers:
                layer.accept_drift()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.due:  # now, when other callbacks have written what they write after an optimizer's step
            self._refresh(model)
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

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.come_first()
        if model is not None and not patched_layers(model):
            self._warn_once(
                "late evaluation",
                "geoscale: this evaluation runs without FP8, since GeoScaleCallback was added after the Trainer was made and "
                "patches when training begins. GeoScaleCallback().attach(trainer) patches at once",
            )

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        layers = self.layers if model is None else geoscale_layers(model)
        if logs is None or not layers:
            return
        if self.calling_trainer() is None:
            self._warn_once(
                "no trainer",
                "geoscale: no Trainer that lists this callback is calling it, so that reporters in front of it (TensorBoard, W&B) "
                "miss its metrics: GeoScaleCallback().attach(trainer)",
            )
        overflows = sum(layer.statistics.overflows for layer in layers)
        if overflows > self.overflows:
            self.overflows = overflows
            logger.warning("geoscale: %d FP8 overflows so far; %s", overflows, cause_of_overflows(layers))
        if (prefix := evaluation_prefix(logs)) is not None:
            self.add_metrics(state, logs, evaluation_metrics(layers, prefix))
            return
        metrics = training_metrics(layers, overflows) | {"geoscale/refresh_seconds": round(self.seconds, 6)}
        kernels = ", ".join(dict.fromkeys(layer.kernels for layer in layers))
        if kernels != self.kernels or "train_runtime" in logs:
            metrics["geoscale/kernels"] = self.kernels = kernels
        self.seconds = 0.0
        self.add_metrics(state, logs, metrics)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics is not None and state.is_hyper_param_search:
            for name in [name for name in metrics if "geoscale/" in name]:
                del metrics[name]

    def on_predict(self, args, state, control, metrics=None, model=None, **kwargs):
        layers = self.layers if model is None else geoscale_layers(model)
        if metrics is not None and layers and (prefix := evaluation_prefix(metrics)) is not None:
            metrics.update(evaluation_metrics(layers, prefix))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._refresh(model)
        if self.layers:
            self.layers[0].group.settle(self.layers)  # no later refresh will look for NaN
        self.layers, self.begun = [], False
