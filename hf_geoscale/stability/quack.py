"""Logit-change control, QuacK of arXiv 2511.21377: how far one optimizer step may move the logits, whatever the weights' size.

A step changes the logits by ΔL ≈ (Q ΔKᵀ + ΔQ Kᵀ)·softmax_scale to first order, so W_Q's update reaches them in proportion to ‖W_K‖
and W_K's in proportion to ‖W_Q‖. QuacK gives each head's W_Q the learning rate τ·η·‖W_K‖₀/‖W_K‖ and its W_K τ·η·‖W_Q‖₀/‖W_Q‖,
Frobenius norms, ₀ at the start. It bounds the change of the logits, not the logits.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .slices import HeadPart, HeadSlices, LogitWeights

INITIAL_REACH = "quack_initial_reach"
"""Key of the first parameter group under which the norms at the start are kept, a list of floats: every way to checkpoint an
optimizer keeps what its groups hold."""


class LogitChangeControl(Optimizer):
    """Runs another optimizer and scales its updates of the slices that make the logits: W ← W_before + factor·(W_after − W_before).

    factor = τ·reach₀/reach per slice (`LogitWeights.reach`); 1 for every other parameter. That equals a learning rate of factor·η
    in any optimizer whose update is proportional to it, decoupled weight decay included. A factor on the gradient would not do:
    Adam and Muon divide by the gradient's size. Memory: one copy of the scaled parameters during the step.

    Weights must be float32 or wider: the inner step rounds to half precision before its update is scaled, so that small updates are
    lost and others come out multiples of the weights' spacing. Such weights are warned of, once. Optimizers that keep the weights
    elsewhere (master weights in float32, schedule-free averages) write over what is scaled here and are not supported.

    Groups, state, schedulers and gradient scaling are those of the inner optimizer. `reach₀` is taken at the first step, and kept
    in the state dict.

    Args:
        inner: the optimizer that makes the updates. LogitChangeControl steps it; do not step it yourself.
        weights: slices of the model.
        tau: τ > 0, dimensionless.
        adaptive: False: factor = τ throughout, without the norms.
    Raises:
        TypeError: `inner` is no torch optimizer. ValueError: τ is not positive and finite, or `inner` holds none of the slices.
    """

    def __init__(self, inner: Optimizer, weights: LogitWeights, tau: float = 1.0, adaptive: bool = True):
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer to wrap, got {type(inner).__name__}")
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau must be positive and finite, got {tau}")
        self.inner, self.weights, self.tau, self.adaptive = inner, weights, tau, adaptive
        self._scaled: list[HeadSlices] | None = None
        self._warn_of_half_precision(self.scaled)
        self._initial: Tensor | None = None
        # The base's __init__ would make groups and state of its own; this sets up hooks alone, as after unpickling.
        super().__setstate__({})

    @property
    def scaled(self) -> list[HeadSlices]:
        """The slices' parameters that the inner optimizer holds. Raises ValueError if there are none."""
        if self._scaled is None:
            held = {id(p) for group in self.inner.param_groups for p in group["params"]}
            self._scaled = [p for p in self.weights.parameters if id(p.parameter) in held] or None
        if self._scaled is None:
            raise ValueError(
                f"the {type(self.inner).__name__} holds none of the {len(self.weights.parameters)} weights and biases that make "
                "queries and keys, so there is nothing to control: they are frozen, as under LoRA, or belong to another model or "
                "optimizer"
            )
        return self._scaled

    @staticmethod
    def _warn_of_half_precision(scaled: list[HeadSlices]) -> None:
        half = [p for p in scaled if p.parameter.dtype.itemsize < torch.float32.itemsize]
        if half:
            warnings.warn(
                f"{len(half)} of the {len(scaled)} weights and biases to control are of half precision ({half[0].name}: "
                f"{half[0].parameter.dtype}): the inner optimizer rounds its update before it is scaled, which is then no learning "
                "rate per head. Keep the weights in float32 and use autocast (bf16=True in TrainingArguments)",
                stacklevel=4,
            )

    @torch.no_grad()
    def factors(self) -> Tensor:
        """Factor of each slice's next update, (slots,) float64.

        Raises:
            ValueError: at the first step, a slice of norm 0 or with NaN or Inf; a state dict of another model.
        """
        if not self.adaptive:
            first = self.scaled[0].parameter
            return torch.full((len(self.weights.names),), self.tau, dtype=torch.float64, device=first.device)
        reach = self.weights.reach(self.weights.norms())
        initial = self._initial_reach(reach)
        return self.tau * torch.where(reach > 0, initial / reach, 1.0)

    def _initial_reach(self, reach: Tensor) -> Tensor:
        if self._initial is None:
            group = self.inner.param_groups[0]
            kept = group.get(INITIAL_REACH)
            if kept is None:
                kept = reach.tolist()
                self._refuse_degenerate(kept)
                group[INITIAL_REACH] = kept
            if len(kept) != len(self.weights.names):
                raise ValueError(
                    f"the optimizer's state is of {len(kept)} slices, the model has {len(self.weights.names)}"
                )
            self._initial = torch.tensor(kept, dtype=torch.float64)
        self._initial = self._initial.to(reach.device)
        return self._initial

    def _refuse_degenerate(self, reach: list[float]) -> None:
        for name, value in zip(self.weights.names, reach, strict=True):
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"{name} faces weights of norm {value} at the first step, and learning rates are relative to that norm: "
                    "start from finite weights other than zero"
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer, its updates of the slices scaled; returns what it returns."""
        factors = self.factors()
        before = [slices.part().local.clone() for slices in self.scaled]
        result = self.inner.step() if closure is None else self.inner.step(closure)
        for slices, start in zip(self.scaled, before, strict=True):
            _scale_update(slices.part(), start, factors)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; its first group holds the norms at the start."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. A state dict of a run without QuacK starts anew from the norms of the next step."""
        self.inner.load_state_dict(state_dict)
        self._initial = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups
        self._scaled = None  # looked up at the next step: a framework may still be exchanging parameters

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand parameters over to the inner optimizer (gradual unfreezing); those of the slices are controlled from the next step
        on, against the norms at the first step of all."""
        self.inner.add_param_group(param_group)
        self._scaled = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def register_state_dict_pre_hook(self, hook, prepend: bool = False):
        return self.inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook, prepend: bool = False):
        return self.inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook, prepend: bool = False):
        return self.inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook, prepend: bool = False):
        return self.inner.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


@torch.no_grad()
def _scale_update(part: HeadPart, start: Tensor, factors: Tensor) -> None:
    """local ← start + factor·(local − start), exactly local where the factor is 1; in float32 at least."""
    rows = part.per_row(factors)
    # lerp with a tensor weight takes tensors of one dtype
    part.local.copy_(torch.lerp(start.to(rows.dtype), part.local.to(rows.dtype), rows))
