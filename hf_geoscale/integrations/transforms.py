"""Function transforms and graph exporters that FP8 attention has no rules for, refused before torch stumbles over it."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..errors import UnsupportedAttentionError


def _never() -> bool:
    return False


def _perhaps() -> bool:
    return True


_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", _never)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", _perhaps)
"""torch's private functions. Without the first, transforms end in torch's own error; without the last, all calls are looked at."""


_HAS_LEVEL = hasattr(forward_ad, "_current_level")


def derives() -> bool:
    """Whether torch.func or forward-mode differentiation may be at work."""
    return bool(_transforms_are_active() or not _HAS_LEVEL or forward_ad._current_level >= 0)


def may_be_transformed() -> bool:
    """A quick look before each call: False in every ordinary forward."""
    level = forward_ad._current_level if _HAS_LEVEL else 0
    return bool(_transforms_are_active() or level >= 0 or _is_tracing() or _modes())


def _transform(operands: tuple[Tensor, ...]) -> str | None:
    """What is transforming the running forward; None for an ordinary one."""
    if _transforms_are_active():
        return "a transform of torch.func (grad, vmap, jvp and their kin)"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    # torch 2.6 says of an export that it compiles; compiled code itself runs with that flag off
    if getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
        return "torch.export"
    if get_proxy_mode() is not None:
        return "make_fx and what is built on it"
    if any(forward_ad.unpack_dual(operand).tangent is not None for operand in operands):
        return "forward-mode differentiation (torch.autograd.forward_ad)"
    return None


def refuse_transforms(*operands: Tensor) -> None:
    """Raise UnsupportedAttentionError inside a transform or an exporter.

    Scales are read off the weights in every forward, on the host, which neither can follow. `torch.func.functional_call` is no
    transform: its weights are measured like any others.
    """
    if (what := _transform(operands)) is not None:
        raise UnsupportedAttentionError(
            f"FP8 attention has no rule for {what}: each forward reads the weights' versions and counts its calls in Python. "
            "Call hf_geoscale.unpatch_model(model) first, and patch the model again afterwards"
        )


def outside_graphs(function: Callable) -> Callable:
    """Have torch.compile leave a function out of its graphs; one graph for all, and a strict export, say why they cannot."""
    options = {}
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # torch 2.7 and later
        options["reason"] = (
            "FP8 attention reads the weights' versions and counts its calls in Python; call hf_geoscale.unpatch_model(model) for a "
            "single graph (fullgraph=True, torch.export)"
        )
    return torch.compiler.disable(function, **options)
