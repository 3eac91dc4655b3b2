"""Hooks that turn one forward of a decoder block into the numbers of fragility diagnostics."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..stability import AttentionCall, attention_fragility, norm_magnitude
from ..stability.fragility import Norms
from .fragility_blocks import BlockModules, is_centred, norm_epsilon
from .masks import HIDDEN
from .norms import gain_and_shift


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class BlockRecorder:
    """Hooks on one block; what it sees is reduced to 0-dimensional tensors at once, on the block's device.

    The gain of a branch is ‖branch‖_F/‖what it is added to‖_F, with a norm layer that takes the branch as its input (Gemma 2,
    OLMo 2) and a `residual_multiplier` (Granite) counted into the branch.
    """

    def __init__(self, modules: BlockModules, tokens: Tensor | None, norms: Norms, v1: bool):
        self.modules, self.tokens = modules, tokens  # tokens: (B, L) bool or None
        self.norms, self.v1 = norms, v1
        self.found: dict[str, Tensor] = {}
        self.norm_spread: list[tuple[Any, Tensor]] = []  # (norm layer, median variance or mean square)
        self.handles: list[RemovableHandle] = []
        self.stream: Tensor | None = None  # what enters the block
        self.branches: dict[str, Tensor] = {}  # "attention", "mlp" → output of the branch

    def install(self) -> None:
        """Register the hooks; `remove` takes them off."""
        modules = self.modules
        attention, block = modules.site.attention, modules.site.block
        self.handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
            attention.register_forward_hook(lambda _, __, out: self._branch("attention", out)),
            modules.output.register_forward_pre_hook(lambda _, args: self._magnitude("attended", args[0])),
        ]
        self.handles += [norm.register_forward_hook(self._norm) for norm in modules.norms]
        self.handles.append(modules.mlp.register_forward_hook(lambda _, __, out: self._branch("mlp", out)))
        if modules.mlp_output is not None:
            first, last = modules.mlp_inputs[0], modules.mlp_output
            self.handles += [
                first.register_forward_pre_hook(lambda _, args: self._magnitude("mlp_input", args[0])),
                last.register_forward_pre_hook(lambda _, args: self._magnitude("activation", args[0])),
            ]

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of (B, L, n) or (B·L, n), padding left out: (N, n) float32."""
        x = x.detach().reshape(-1, x.shape[-1])
        return x.float() if self.tokens is None else x[self.tokens.flatten()].float()

    def _magnitude(self, name: str, x: Tensor) -> None:
        self.found[name] = self.rows(x).norm()

    def _enter(self, _, args: tuple, kwargs: dict) -> None:
        self.stream = args[0] if args else kwargs["hidden_states"]
        self.found, self.norm_spread, self.branches = (
            {},
            [],
            {},
        )  # of the last pass, where a model runs a block several times

    def _branch(self, name: str, output: Any) -> None:
        self.branches[name] = _first(output)

    def _norm(self, norm: Any, args: tuple, output: Tensor) -> None:
        x = args[0]
        gain, _ = gain_and_shift(norm, self.modules.site.describe(type(norm).__name__))
        magnitude, spread = norm_magnitude(self.rows(x), gain, norm_epsilon(norm), is_centred(norm))
        self.found["norm_magnitude"] = self.found.get("norm_magnitude", magnitude.new_zeros(())) + magnitude
        self.norm_spread.append((norm, spread))
        for name, branch in self.branches.items():
            if x is branch:  # a norm layer ends this branch
                self.branches[name] = output

    def _leave(self, _, __, output: Any) -> None:
        multiplier = float(getattr(self.modules.site.block, "residual_multiplier", None) or 1.0)
        if self.stream is None:  # left by an exception of an earlier forward
            return
        stream = self.rows(self.stream)
        branches = {name: self.rows(x) * multiplier for name, x in self.branches.items()}
        for name in ("attention", "mlp"):
            self.found[f"{name}_gain"] = branches[name].norm() / stream.norm().clamp_min(
                torch.finfo(torch.float32).tiny
            )
            stream = stream + branches[name]
        self.found["mlp_branch"] = branches["mlp"].norm()
        self.found["final_norm"] = self.rows(_first(output)).norm()
        self.stream, self.branches = None, {}

    def attend(self, call: AttentionCall) -> None:
        """Take the operands of this block's attention."""
        self.found |= attention_fragility(call, self.norms, self.v1)


def rows_of_mask(mask: Tensor | None, causal: bool, window: int | None):
    """(visible, bias) of `AttentionCall` for a mask of the attention interface, (B, 1 or H, L, L) bool or additive."""
    if mask is None:

        def visible(rows: Tensor, length: int) -> Tensor:
            keys = torch.arange(length, device=rows.device)
            seen = (keys <= rows[:, None]) | (not causal)
            return (seen if window is None else seen & (keys > rows[:, None] - window))[None, None]

        return visible, None
    if mask.dtype == torch.bool:
        return (lambda rows, _: mask[:, :, rows]), None
    return (lambda rows, _: mask[:, :, rows] > HIDDEN), (lambda rows: mask[:, :, rows].float().clamp_min(HIDDEN))
