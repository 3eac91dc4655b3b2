"""Random operands of attention, their scales, and what exact attention makes of them."""

import math

import torch
from torch import Tensor

from hf_geoscale.scaling import E4M3

from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR


def draw(batch=2, heads=4, kv_heads=2, rows=70, keys=None, dim=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = rows if keys is None else keys
    shapes = ((batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def scales(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """quant_scales from a norm bound 1.5 × the largest row, as a certificate would leave."""
    bounds = [1.5 * x.detach().float().norm(dim=-1).amax((0, 2)) for x in (q, k, v)]
    return {f"{n}_quant_scale": E4M3.max / b for n, b in zip("qkv", bounds, strict=True)}


def exact(q, k, v, visible: Tensor, softmax_scale: float, keep: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Dense attention in float64; visible (B or 1, 1, Lq, Lk); rows that see nothing give 0."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.mT * softmax_scale).masked_fill(~visible, -math.inf)
    p = torch.nan_to_num(logits.softmax(-1))
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    return p @ v


def relative(approximation: Tensor, reference_: Tensor) -> float:
    approximation, reference_ = approximation.detach().double(), reference_.detach().double()
    return float((approximation - reference_).norm() / reference_.norm())


def assert_near_exact(out: Tensor, truth: Tensor, operands: list[Tensor], seed: int) -> None:
    """Output, and gradients of one random gradient of it, within the bounds of `tolerances`."""
    assert relative(out, truth) < OUTPUT_ERROR
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.device)
    ours = torch.autograd.grad(out, operands, gradient)
    theirs = torch.autograd.grad(truth, operands, gradient.double())
    for mine, expected in zip(ours, theirs, strict=True):
        assert relative(mine, expected) < GRADIENT_ERROR
