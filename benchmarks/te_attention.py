"""Transformer Engine's FP8 attention as a rival in the speed benchmark: delayed scaling, as it trains on Hopper."""

from typing import Any

import torch
from rivals import Results, Rival, Shape, require
from torch import Tensor

WARMUP = 3
"""Forwards and backwards before timing; delayed scaling starts at scale 1 and then reads its history."""


class TransformerEngineFp8(Rival):
    """DotProductAttention with fp8_dpa: BF16 in, quantisation, cuDNN's FP8 attention, BF16 out, under autograd.

    There is no call of its kernels alone. Other backends are disabled in training with fp8_dpa: it runs in FP8 or raises.
    """

    name = "Transformer Engine FP8"
    has_backward, has_kernels = True, False

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        if shape.window or shape.dim != 128:
            raise NotImplementedError("on Hopper it trains head dimension 128 without a window only")
        super().__init__(q, k, v, grad, shape)
        self.te: Any = require("transformer_engine.pytorch", "transformer_engine[pytorch]")
        recipes = require("transformer_engine.common.recipe", "transformer_engine[pytorch]")
        self.recipe = recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, amax_history_len=16, fp8_dpa=True)
        mask = "causal" if shape.causal else "no_mask"
        self.core = self.te.DotProductAttention(
            shape.heads, shape.dim, shape.kv_heads, qkv_format="bshd", attn_mask_type=mask
        )
        for _ in range(WARMUP):
            self.whole_both()

    def whole_forward(self) -> Tensor:
        shape = self.shape
        with self.te.autocast(enabled=True, recipe=self.recipe):
            out = self.core(*(x.transpose(1, 2) for x in self.leaves))  # (B, L, H, D), as the memory is
        return out.view(shape.batch, shape.length, shape.heads, shape.dim).transpose(1, 2)

    def whole_both(self) -> tuple[Tensor, ...]:
        out = self.whole_forward()
        return out, *torch.autograd.grad(out, self.leaves, self.grad)

    def result(self) -> Results:
        out, *gradients = self.whole_both()
        return out.detach().float(), *(x.float() for x in gradients)
