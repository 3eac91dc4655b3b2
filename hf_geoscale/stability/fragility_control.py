"""What to do about fragility: a warning from κ_softmax, and a controller of the norm layers' ε. Both opt-in."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
"""Attributes in which norm layers keep ε, of torch, of Llama's kin, and of others."""

PAST = 512
"""Risks of a layer that a `NormEpsilonController` remembers."""


@dataclass
class EarlyWarning:
    """Warns when the running maximum of κ_softmax leaves its own past.

    After each observation m = the maximum of the last `span`; a warning when m > `ratio` × the median of the maxima before
    these. The published rule is the running maximum alone (lead 16–24 steps); the numbers are ours, chosen on runs of a small
    GPT-2; benchmarks/fragility.py counts how often they warn of nothing.

    Args:
        span: observations of the running maximum.
        warm_up: observations of the past that must be there before the first warning.
        memory: running maxima that make up the past. Bounded, since κ_softmax grows while a healthy model learns, too.
        ratio: > 1, how far above its past.
    """

    span: int = 4
    warm_up: int = 24
    memory: int = 32
    ratio: float = 2.0
    recent: deque[float] = field(default_factory=deque, init=False)
    past: deque[float] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        if self.span < 1 or self.warm_up < 1:
            raise ValueError(f"span and warm_up must be at least 1 observation, got {self.span} and {self.warm_up}")
        if self.memory < self.warm_up:
            raise ValueError(f"memory must be at least warm_up, {self.warm_up} observations, got {self.memory}")
        self.past = deque(maxlen=self.memory)
        if not self.ratio > 1:
            raise ValueError(f"ratio must be above 1, got {self.ratio}")

    def observe(self, kappa_softmax: float) -> bool:
        """Take the largest κ_softmax of any layer; True for a warning. A value that is not finite always warns."""
        self.recent.append(kappa_softmax)
        largest = max(self.recent)
        warns = not kappa_softmax < float("inf")
        if len(self.past) >= self.warm_up:
            warns |= largest > self.ratio * median(self.past)
        if len(self.recent) == self.span:
            self.recent.popleft()
            if largest < float("inf"):
                self.past.append(largest)
        return warns


@dataclass
class NormEpsilonController:
    """Raises the ε of the norm layers of a layer whose risk leaves its past: ε ← min(`factor`·max(ε, `base`), `cap`).

    The published controller and its limits. It changes the model that is trained: a larger ε shrinks what the norm emits
    where a token's variance is not far above ε, and does nothing where it is (ρ_LN ≫ 1). Certificates stay valid, since
    ‖x/√(s + ε)‖₂ ≤ √d for every ε ≥ 0. `restore` puts every ε back; nothing is saved in a checkpoint.

    Args:
        percentile: of a layer's own past risks, which a new one must exceed; in (0, 100).
        factor: > 1. base, cap: least ε to start from, and the largest.
        per_step, per_layer, total: actions at most. An action raises every norm layer of one decoder layer.
        cooldown: observations a layer is left alone after an action.
        warm_up: observations before the first action.
    """

    percentile: float = 80.0
    factor: float = 4.0
    base: float = 1e-5
    cap: float = 1e-2
    per_step: int = 2
    per_layer: int = 6
    total: int = 24
    cooldown: int = 10
    warm_up: int = 24
    observations: int = field(default=0, init=False)
    past: dict[int, deque[float]] = field(default_factory=dict, init=False)
    actions: list[tuple[int, int]] = field(default_factory=list, init=False)  # (observation, layer)
    originals: list[tuple[Any, str, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.percentile < 100:
            raise ValueError(f"percentile must lie in (0, 100), got {self.percentile}")
        if not self.factor > 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        if not 0 < self.base <= self.cap:
            raise ValueError(f"base and cap must satisfy 0 < base <= cap, got {self.base} and {self.cap}")
        for name in ("per_step", "per_layer", "total", "cooldown", "warm_up"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def observe(self, risks: Sequence[float], norms: Sequence[Sequence[Any]]) -> list[int]:
        """Take the risk of every layer and act on its norm layers.

        Args:
            risks: of consecutive layers.
            norms: the norm modules of each layer.
        Returns:
            The layers whose ε was raised.
        Raises:
            ValueError: another number of layers than risks.
        """
        if len(risks) != len(norms):
            raise ValueError(f"one list of norm layers a risk is needed, got {len(norms)} lists and {len(risks)} risks")
        self.observations += 1
        raised: list[int] = []
        if self.observations > self.warm_up:
            excess = {layer: risk / self._threshold(layer) for layer, risk in enumerate(risks)}
            for layer in sorted(excess, key=lambda x: -excess[x]):
                may_act = excess[layer] > 1 and len(raised) < self.per_step and self._may_act(layer)
                if may_act and self._raise(norms[layer]):
                    self.actions.append((self.observations, layer))
                    raised.append(layer)
        for layer, risk in enumerate(risks):
            self.past.setdefault(layer, deque(maxlen=PAST)).append(risk)
        return raised

    def _threshold(self, layer: int) -> float:
        past = self.past.get(layer, ())
        if len(past) < 2:
            return float("inf")
        cuts = quantiles(past, n=1000, method="inclusive")
        return max(cuts[min(round(self.percentile * 10), 999) - 1], 1e-300)

    def _may_act(self, layer: int) -> bool:
        mine = [when for when, where in self.actions if where == layer]
        rested = not mine or self.observations - mine[-1] > self.cooldown
        return rested and len(mine) < self.per_layer and len(self.actions) < self.total

    def _raise(self, modules: Sequence[Any]) -> bool:
        """Whether any ε could still grow."""
        changed = False
        for module in modules:
            name = epsilon_name(module)
            if name is None:
                continue
            old = float(getattr(module, name))
            new = min(self.factor * max(old, self.base), self.cap)
            if new > old:
                self.originals.append((module, name, old))
                setattr(module, name, new)
                changed = True
        return changed

    def restore(self) -> None:
        """Put back the ε of every norm layer that was changed, the latest change first."""
        while self.originals:
            module, name, value = self.originals.pop()
            setattr(module, name, value)


def epsilon_name(module: Any) -> str | None:
    """The attribute that holds a norm layer's ε; None where it has none of its own."""
    return next((name for name in EPSILON_NAMES if isinstance(getattr(module, name, None), float)), None)
