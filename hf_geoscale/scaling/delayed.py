"""Delayed scaling, as Transformer Engine has it: a scale from the largest magnitudes of earlier calls. A rival, for comparison."""

from typing import Any

import torch
from torch import Tensor

from ..config import Delayed
from ..geometry import LayerGeometry
from .formats import E4M3
from .strategy import CallOperands, QuantScales


class DelayedScaling:
    """quant_scale = 448 / (2^margin · amax), amax the largest (or latest) magnitude in a history of calls; 1 before the first.

    One scale a tensor, not a head. A history of zeros or one that holds NaN or Inf leaves the scale as it was. Scales move when
    the weights have moved (once an optimizer step) and, without gradients, before each call: a checkpointed forward and its
    recomputation see the same ones. Source: Transformer Engine 2, `DelayedScaling` and `_default_sf_compute`.

    Args:
        options: history length, reduction and margin.
        quantize_logits: whether to give a scale for logits.
    """

    observes, needs_interaction = True, False

    def __init__(self, options: Delayed | None = None, quantize_logits: bool = False):
        self.options = options or Delayed()
        names = ("q", "k", "v", "logit") if quantize_logits else ("q", "k", "v")
        self.history = {name: torch.zeros(self.options.history) for name in names}  # newest first
        self.scale = {name: torch.ones(()) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """Histories and scales as numbers, which share no memory with the original and need no file on the way to a process."""
        numbers = {part: {name: x.tolist() for name, x in getattr(self, part).items()} for part in ("history", "scale")}
        return self.__dict__ | numbers

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {part: {name: torch.tensor(x) for name, x in state[part].items()} for part in ("history", "scale")}
        self.__dict__.update(state | tensors)

    def refresh(self, geometry: LayerGeometry) -> None:
        """The weights moved; what they are is of no interest."""
        self._advance()

    def quant_scales(self, call: CallOperands) -> QuantScales:
        if not torch.is_grad_enabled():
            self._advance()
        heads, kv_heads = call.heads
        scale = {name: x.to(call.device) for name, x in self.scale.items()}
        logit = scale["logit"].expand(heads) if "logit" in scale else None
        return QuantScales(scale["q"].expand(heads), scale["k"].expand(kv_heads), scale["v"].expand(kv_heads), logit)

    @torch.inference_mode(False)  # autograd saves what comes of it, if a later call trains
    @torch.no_grad()
    def observe(self, amax: dict[str, Tensor]) -> None:
        for name, history in self.history.items():
            newest = amax[name].detach().float().amax()
            self.history[name] = torch.cat([newest[None], history[:-1].to(newest.device)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _advance(self) -> None:
        for name, history in self.history.items():
            amax = history.amax() if self.options.reduction == "max" else history[0]
            wanted = E4M3.max / (amax * 2.0**self.options.margin)
            old = self.scale[name].to(amax.device)
            self.scale[name] = torch.where((amax > 0) & torch.isfinite(amax) & torch.isfinite(wanted), wanted, old)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold for a resumed run to go on with the same scales."""
        return {"history": dict(self.history), "scale": dict(self.scale)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Raises ValueError unless the state is of the same operands and history length."""
        for part, mine in (("history", self.history), ("scale", self.scale)):
            given = state.get(part, {})
            if given.keys() != mine.keys() or any(given[name].shape != mine[name].shape for name in mine):
                expected = {name: tuple(x.shape) for name, x in mine.items()}
                found = {name: tuple(x.shape) for name, x in given.items()}
                raise ValueError(f"delayed scaling needs {part} {expected}, got {found}")
        self.history, self.scale = dict(state["history"]), dict(state["scale"])
