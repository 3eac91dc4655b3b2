"""The fused backend as custom ops that autograd and torch.compile understand; what they run is in `passes`."""

import math
from functools import wraps
from inspect import signature

import torch
from torch import Tensor

from . import passes
from .reference import PROBABILITY_QUANT_SCALE

INPUTS = len(signature(passes.forward).parameters)


def _remember(ctx, output: tuple[Tensor, ...], inputs: tuple) -> None:
    """Keep what the backward reads: FP8 operands, O and its row statistics, and what is no tensor of this call's size."""
    *operands, interleaved, softmax_scale, softcap, causal, window, dropout_p, incoherent, _, _, _ = inputs
    query, key, value, *constants = operands
    ctx.save_for_backward(*output[:8], *constants)
    ctx.options = interleaved, softmax_scale, softcap, causal, window, dropout_p, incoherent
    ctx.dtypes = [query.dtype, key.dtype, value.dtype]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fp8_attention has first derivatives only; its backward was called with create_graph=True")


class _Attention(torch.autograd.Function):
    """Autograd of the op, at its Autograd key: `torch.library.register_autograd` adds 0.5 ms of CPU time to every call."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = attention_forward(*inputs)
        _remember(ctx, output, inputs)
        return output

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * INPUTS
        _refuse_second_derivatives()
        grads = attention_backward(grad_out, *ctx.saved_tensors, *ctx.options, False, *ctx.dtypes)
        return (*grads, *[None] * (INPUTS - 3))


class PackedAttention(torch.autograd.Function):
    """The op on views of one tensor (B, L, (Hq + 2·Hkv)·D), which gets one gradient: no split to be undone by a concatenation."""

    @staticmethod
    def forward(ctx, packed, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = attention_forward(*inputs)
        _remember(ctx, output, inputs)
        ctx.packed = packed.shape, packed.dtype
        return output

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * (INPUTS + 1)
        _refuse_second_derivatives()
        shape, dtype = ctx.packed
        grad, _, _ = attention_backward(grad_out, *ctx.saved_tensors, *ctx.options, True, dtype, dtype, dtype)
        return (grad.view(shape), *[None] * INPUTS)


def _on_device_of_operands(run):
    """Triton launches on the current device; make it the first operand's."""

    @wraps(run)
    def call(x: Tensor, *args):
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return run(x, *args)
        with torch.cuda.device_of(x):
            return run(x, *args)

    return call


# Defined through a Library: the wrapper of `torch.library.custom_op` adds 0.4 ms of CPU time to every call (docs/kernels.md).
_library = torch.library.Library("hf_geoscale", "FRAGMENT")
for _name, _run, _fake, _mutated in (
    ("fp8_attention", passes.forward, passes.fake_forward, ()),
    ("fp8_attention_backward", passes.backward, passes.fake_backward, ("gradient_overflow",)),
):
    _library.define(_name + torch.library.infer_schema(_run, mutates_args=_mutated))
    _library.impl(_name, _on_device_of_operands(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_geoscale::{_name}", _fake, lib=_library)
_library.impl("fp8_attention", _Attention.apply, "Autograd")
attention_forward = torch.ops.hf_geoscale.fp8_attention
attention_backward = torch.ops.hf_geoscale.fp8_attention_backward


def lse(shift: Tensor, row_sum: Tensor) -> Tensor:
    """Natural log-sum-exp of the logits per row, (B, Hq, Lq) float32; −inf for a row that sees no key."""
    return (shift + math.log2(PROBABILITY_QUANT_SCALE)) * math.log(2) + row_sum.log()
