"""What a call of a module runs besides its class's forward: forwards of its own, and hooks, that may change values.

A certificate speaks of what the class computes. A replaced forward is accepted where it is accelerate's, which calls the class's.
A hook is accepted where it belongs to a library that leaves values alone, where its code returns nothing, or where it was run
once and left the values as they were. Any other is refused by name. Nobody notices a hook that writes into its arguments in
place, one that changes values at some calls only, and hooks of all modules (`torch.nn.modules.module.register_module_*_hook`).
"""

import dis
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_TRUSTED = frozenset(
    (
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "deepspeed",
        "bitsandbytes",
        "torchao",
        "transformer_engine",
        "hf_geoscale",
    )
)
"""Packages whose hooks gather, place or observe, and change no values."""

_harmless: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""Of modules with hooks of others: the handles' numbers, which never recur, of hooks that were run and changed nothing."""


def origin_of(function: Any) -> str:
    """The Python module of a function, method, partial or callable object."""
    function = getattr(function, "func", function)  # functools.partial
    function = getattr(function, "__func__", function)
    return getattr(function, "__module__", None) or type(function).__module__


def call_state(module: nn.Module) -> tuple:
    """Changes when a hook or a forward of this module's own is put on or taken off; () where there are none."""
    own = module.__dict__
    hooks, pre_hooks = own["_forward_hooks"], own["_forward_pre_hooks"]
    if not hooks and not pre_hooks and "forward" not in own:
        return ()
    return (*hooks, None, *pre_hooks, id(own.get("forward")))


def check_forward(module: nn.Module, where: str) -> None:
    """Raise UnsupportedModelError where an instance's forward was replaced and does not call its class's alone."""
    forward = module.__dict__.get("forward")
    if forward is None or _is_accelerates(module, forward):
        return
    raise UnsupportedModelError(
        f"{where} runs a forward of {origin_of(forward)} instead of its class's, and no weight of the module bounds its output "
        "(LyCORIS replaces forwards). Merge the adapter into the weight, or unpatch the model"
    )


def bound_function(module: nn.Module) -> Callable | None:
    """The function behind an instance's forward that is a method of that very instance (Liger-Kernel's), which keeps no state
    elsewhere; None for any other."""
    forward = module.__dict__.get("forward")
    return forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else None


def _is_accelerates(module: nn.Module, forward: Any) -> bool:
    """Whether accelerate wrapped this forward in hooks of its own around the class's."""
    hook, inner = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    if hook is None or getattr(inner, "__func__", None) is not type(module).forward:
        return False
    hooks = getattr(hook, "hooks", (hook,))
    return all(type(part).__module__.startswith("accelerate.") for part in hooks)


def returns_nothing(function: Any) -> bool:
    """Whether a function's code returns None on every path."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return False
    before, found = None, False
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST":
            if instruction.argval is not None:
                return False
            found = True
        elif instruction.opname.startswith("RETURN_VALUE"):
            if before is None or not before.opname.startswith("LOAD_CO") or before.argval is not None:
                return False
            found = True
        before = instruction
    return found


def _others_hooks(module: nn.Module, hooks: dict[int, Callable]) -> Iterator[tuple[int, Callable]]:
    """Hooks that may change values, and were not seen to leave them."""
    seen = _harmless.get(module, ())
    for number, hook in hooks.items():
        if number not in seen and origin_of(hook).partition(".")[0] not in _TRUSTED and not returns_nothing(hook):
            yield number, hook


def check_hooks(module: nn.Module, where: str, width: int | tuple[int, ...], before_only: bool = False) -> None:
    """Run hooks of others once, on random rows, and refuse those that change values.

    Args:
        where: names the module in messages.
        width: of the rows that the module takes.
        before_only: look at hooks before the forward alone.
    Raises:
        UnsupportedModelError: a hook that changes what goes in or comes out, or that fails on such rows.
    """
    if not module._forward_pre_hooks and not module._forward_hooks:
        return
    before = list(_others_hooks(module, module._forward_pre_hooks))
    after = [] if before_only else list(_others_hooks(module, module._forward_hooks))
    if not before and not after:
        return
    parameter = next(module.parameters(), torch.empty(0))
    shape = (width,) if isinstance(width, int) else width
    rows = torch.randn(2, *shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    rows = rows.to(parameter.device, parameter.dtype if parameter.is_floating_point() else torch.float32)[None]
    for number, hook in before:
        with_kwargs = number in module._forward_pre_hooks_with_kwargs
        _run(module, where, hook, (rows,), with_kwargs, lambda given: _first(given))
    for number, hook in after:
        with torch.no_grad():
            out = module.forward(rows)
        with_kwargs = number in module._forward_hooks_with_kwargs
        _run(module, where, hook, (rows,), with_kwargs, lambda given: given, out)
    _harmless.setdefault(module, set()).update(number for number, _ in (*before, *after))


def _first(given: Any) -> Any:
    """The hidden states in what a pre-hook returns: the value, or the first of its arguments, or of ((args), {kwargs})."""
    while isinstance(given, tuple) and given:
        given = given[0]
    return given


def _run(
    module: nn.Module,
    where: str,
    hook: Callable,
    args: tuple[Tensor],
    with_kwargs: bool,
    value_of: Callable[[Any], Any],
    out: Any = None,
) -> None:
    expected = args[0] if out is None else out
    kept = expected.clone()
    try:
        with torch.no_grad():
            given = hook(module, args, *([{}] if with_kwargs else []), *([] if out is None else [out]))
    except Exception as error:
        raise UnsupportedModelError(
            f"{where} has a hook of {origin_of(hook)} that may change values and cannot be run alone "
            f"({type(error).__name__}: {error}). Remove the hook before patching, or unpatch the model"
        ) from error
    changed = given is not None and not _same(value_of(given), kept)
    if changed or not torch.equal(expected, kept):
        raise UnsupportedModelError(
            f"{where} has a hook of {origin_of(hook)} that changes values, which no weight bounds. Remove the hook, or unpatch the "
            "model"
        )


def _same(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == expected.shape and torch.equal(value, expected)
