"""The fused backend as custom ops that autograd and torch.compile understand; what they run is in `passes`."""

import math
from functools import wraps
from inspect import signature

import torch
from torch import Tensor

from . import passes
from .reference import PROBABILITY_QUANT_SCALE
from .replay import repeated

Packed = Tensor | tuple[Tensor, Tensor, Tensor]
"""What query, key and value are views of: one tensor (B, L, (Hq + 2·Hkv)·D), or one of each, (B, L, H·D)."""

NO_NORM: tuple = (None, None, 0.0)
"""Defaults of the last inputs, the norms' weights and epsilon: the dispatcher does not pass on what equals its default."""
INPUTS = len(signature(passes.forward).parameters)
BEFORE_NORM = INPUTS - len(NO_NORM)
OPTIONS = list(signature(passes.forward).parameters).index("interleaved")
"""Inputs from here on are options: what a call computes, and last three that no backward asks for."""


_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
"""torch's private functions that tell of dispatch modes and transforms. Without one, every call goes through the dispatcher."""


def _nobody_watches(x: Tensor) -> bool:
    """Whether no compiler, dispatch mode, transform or tensor subclass has to see the ops: autograd alone does."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or _modes is None
        or _transforms is None
        or _modes()
        or _transforms()
    )


def _run_forward(inputs: tuple, counted: Tensor | None) -> tuple[Tensor, ...]:
    """The op below autograd; without the dispatcher, which takes longer than some launches, where nobody watches.

    Args:
        counted: zeros to count into, used there; None for a buffer of the op's own.
    """
    if _nobody_watches(inputs[0]):
        return _forward(*inputs) if counted is None else (*_forward_into(counted, *inputs), counted)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_forward(*inputs)


def _norm(inputs: tuple) -> tuple:
    given = inputs[BEFORE_NORM:]
    return given + NO_NORM[len(given) :]


def _remember(ctx, output: tuple[Tensor, ...], inputs: tuple) -> None:
    """Keep what the backward reads: FP8 operands, O and its row statistics, and what is no tensor of this call's size.

    Where query and key are normalised, also these two as they came: views of what their projections gave.
    """
    query, key, value, *constants = inputs[:OPTIONS]
    ctx.options = inputs[OPTIONS : BEFORE_NORM - 3]
    q_norm, k_norm, ctx.norm_eps = _norm(inputs)
    raw = (None, None) if q_norm is None else (query, key)
    ctx.save_for_backward(*output, *constants, *raw, q_norm, k_norm)
    ctx.dtypes = query.dtype, key.dtype, value.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fp8_attention has first derivatives only; its backward was called with create_graph=True")


def _backward(ctx, grad_out: Tensor, packed: bool, *dtypes: torch.dtype) -> tuple:
    """Gradients of the operands, as `passes.backward` gives them, and of the two norms' weights."""
    _refuse_second_derivatives()
    *saved, query, key, q_norm, k_norm = ctx.saved_tensors
    run = _backward_pass if _nobody_watches(grad_out) else attention_backward
    *grads, partial = run(grad_out, *saved, *ctx.options, packed, *dtypes, query, key, q_norm, k_norm, ctx.norm_eps)
    if q_norm is None:
        return *grads, None, None
    by_operand = partial.split((query.shape[1], key.shape[1]), dim=1)
    needed = ctx.needs_input_grad[-4:-2]
    norm_grads = [
        x.sum((0, 1, 2)).to(weight.dtype) if wanted else None
        for x, weight, wanted in zip(by_operand, (q_norm, k_norm), needed, strict=True)
    ]
    return *grads, *norm_grads


class _Attention(torch.autograd.Function):
    """Autograd of the op, of (query, key, value, q_norm, k_norm, all inputs, counters): each argument costs time, so only the first
    five are seen.

    At the op's Autograd key: `torch.library.register_autograd` adds 0.5 ms of CPU time to every call.
    """

    @staticmethod
    def forward(ctx, query, key, value, q_norm, k_norm, inputs, counted):
        output = _run_forward(inputs, *counted)
        _remember(ctx, output, inputs)
        return output

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 7
        return *_backward(ctx, grad_out, False, *ctx.dtypes), None, None


class PackedAttention(torch.autograd.Function):
    """The op on views of one tensor (B, L, (Hq + 2·Hkv)·D), which gets one gradient: no split to be undone by a concatenation."""

    @staticmethod
    def forward(ctx, packed, q_norm, k_norm, inputs, counted):
        output = _run_forward(inputs, *counted)
        _remember(ctx, output, inputs)
        ctx.packed = packed.shape, packed.dtype
        return output

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 5
        shape, dtype = ctx.packed
        grad, _, _, *norm_grads = _backward(ctx, grad_out, True, dtype, dtype, dtype)
        return grad.view(shape), *norm_grads, None, None


class RowsAttention(torch.autograd.Function):
    """The op on views of three tensors (B, L, H·D), which get gradients of that shape: no views for autograd to go back through."""

    @staticmethod
    def forward(ctx, query, key, value, q_norm, k_norm, inputs, counted):
        output = _run_forward(inputs, *counted)
        _remember(ctx, output, inputs)
        ctx.rows = [(x.shape, x.dtype) for x in (query, key, value)]
        return output

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 7
        *grads, q_norm, k_norm = _backward(ctx, grad_out, False, *(dtype for _, dtype in ctx.rows))
        rows = [x.transpose(1, 2).reshape(shape) for x, (shape, _) in zip(grads, ctx.rows, strict=True)]
        return *rows, q_norm, k_norm, None, None


def _with_gradients(*inputs, counted: Tensor | None = None) -> tuple[Tensor, ...]:
    return _Attention.apply(*inputs[:3], *_norm(inputs)[:2], inputs, (counted,))


def _on_device_of_operands(run):
    """Triton launches on the current device; make it the first operand's."""

    @wraps(run)
    def call(x: Tensor, *args):
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return run(x, *args)
        with torch.cuda.device_of(x):
            return run(x, *args)

    return call


_forward = _on_device_of_operands(repeated(passes.forward))
_forward_into = _on_device_of_operands(repeated(passes.forward_into))
_backward_pass = _on_device_of_operands(repeated(passes.backward))

# Defined through a Library: the wrapper of `torch.library.custom_op` adds 0.4 ms of CPU time to every call (docs/kernels.md).
_library = torch.library.Library("hf_geoscale", "FRAGMENT")
for _name, _run, _fake, _mutated in (
    ("fp8_attention", _forward, passes.fake_forward, ()),
    ("fp8_attention_backward", _backward_pass, passes.fake_backward, ("gradient_overflow",)),
):
    _library.define(_name + torch.library.infer_schema(_run, mutates_args=_mutated))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_geoscale::{_name}", _fake, lib=_library)
_library.impl("fp8_attention", _with_gradients, "Autograd")
attention_forward = torch.ops.hf_geoscale.fp8_attention
attention_backward = torch.ops.hf_geoscale.fp8_attention_backward


def attend(packed: Packed | None, counted: Tensor | None, *inputs) -> tuple[Tensor, ...]:
    """`attention_forward` of these inputs, with gradients; those of the operands as of `packed`, where they are views of it.

    Args:
        counted: zeros, which the call may count into instead of a buffer of its own.
    """
    if packed is not None:
        alone = isinstance(packed, tuple) and _norm(inputs)[0] is None  # then nobody keeps them beyond the forward
        inputs = inputs if alone else (*(x.detach() for x in inputs[:3]), *inputs[3:])
        if isinstance(packed, tuple):
            return RowsAttention.apply(*packed, *_norm(inputs)[:2], inputs, (counted,))
        return PackedAttention.apply(packed, *_norm(inputs)[:2], inputs, (counted,))
    if not _nobody_watches(inputs[0]):
        return attention_forward(*inputs)
    return _with_gradients(*inputs, counted=counted)


def lse(shift: Tensor, row_sum: Tensor) -> Tensor:
    """Natural log-sum-exp of the logits per row, (B, Hq, Lq) float32; −inf for a row that sees no key."""
    return (shift + math.log2(PROBABILITY_QUANT_SCALE)) * math.log(2) + row_sum.log()
