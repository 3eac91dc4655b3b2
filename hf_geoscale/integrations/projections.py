"""Projections of queries, keys and values whose gradients of the hidden states are added up inside the matrix products.

Autograd gives the hidden states one gradient a projection, and adds them in two passes over memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_of_torch

from .transforms import derives

_PLAIN = (Tensor, nn.Parameter)
_LINEAR_FORWARD = nn.Linear.forward
"""To notice whoever replaces it."""

_GLOBAL_HOOKS = tuple(
    getattr(module_of_torch, name, None)  # torch 2.6 has no function that tells
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
"""Hooks of all modules. A torch without one of these dictionaries may run hooks that nobody here sees: no module is bare."""


def is_bare(module: Any) -> bool:
    """Whether a call of this module runs its class's forward and nothing around it, hooks of all modules included, on a weight
    that is no shard.
    """
    own = module.__dict__
    return not (
        _GLOBAL_HOOKS != ({}, {}, {}, {})
        or "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
        or type(own["_parameters"].get("weight")) not in _PLAIN
    )


class _Projections(torch.autograd.Function):
    """x Wᵀ + b of several W, b, each (…, N): of (x, W, b, W, b, …)."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, *parameters):
        trained = True in ctx.needs_input_grad[1::2]  # only then does the backward read the hidden states
        ctx.save_for_backward(hidden_states if trained else None, *parameters[::2])
        return tuple([functional.linear(hidden_states, *parameters[i : i + 2]) for i in range(0, len(parameters), 2)])

    @staticmethod
    def backward(ctx, *grads):
        hidden_states, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = None if hidden_states is None else hidden_states.flatten(0, -2)
        total, of_parameters = None, [None] * (len(needed) - 1)
        for i in range(len(weights) - 1, -1, -1):  # queries, the most heads, last: rounded once
            grad, weight = grads[i].flatten(0, -2), weights[i]
            if needed[0]:
                total = grad @ weight if total is None else total.addmm_(grad, weight)
            if needed[2 * i + 1]:
                of_parameters[2 * i] = grad.T @ rows
            if needed[2 * i + 2]:
                of_parameters[2 * i + 1] = grad.sum(0)
        if total is not None:
            total = total.view(*grads[0].shape[:-1], total.shape[-1])
        return total, *of_parameters


def project(
    hidden_states: Tensor,  # (B, L, d)
    modules: Sequence[nn.Module],
) -> tuple[Tensor, ...]:
    """Each module's output, (B, L, N). Modules that are more than linear layers are called, one by one."""
    if not _together(hidden_states, modules):
        return tuple([module(hidden_states) for module in modules])
    parameters: list[Tensor | None] = []
    for module in modules:
        own = module._parameters
        parameters += own["weight"], own["bias"]
    return _Projections.apply(hidden_states, *parameters)


def heads_first(
    projected: Any,  # (B, L, 3·H·D), or a tuple of three (B, L, H·D)
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of what projections gave, (B, H, L, D) each."""
    query, key, value = projected if type(projected) is tuple else projected.chunk(3, dim=-1)
    shape = (*query.shape[:-1], -1, dim)
    return query.view(shape).transpose(1, 2), key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)


def _together(hidden_states: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Whether nothing but autograd has to see the products: no adapter, hook, quantisation, autocast or compiler."""
    if not hidden_states.requires_grad or type(hidden_states) is not Tensor or nn.Linear.forward is not _LINEAR_FORWARD:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    if derives():
        return False  # the attention names what it refuses
    for module in modules:
        if type(module) is not nn.Linear or not is_bare(module):
            return False
        bias = module._parameters.get("bias", 0)
        if bias is not None and type(bias) not in _PLAIN:
            return False
    return True
