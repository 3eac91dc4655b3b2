"""What a call of a module runs besides its class's forward: forwards of its own, and hooks, that may change values.

A certificate speaks of what the class computes. A replaced forward is accepted where it is accelerate's, which calls the class's.
A hook is accepted where it belongs to a library that leaves values alone, or where its code returns nothing. Any other is
watched: the forward in which it changes a value raises. One put on after patching is watched from the next refresh, or from
the second forward on. Nobody notices hooks of all modules (`torch.nn.modules.module.register_module_*_hook`), and a hook that
returns nothing but writes into its arguments.
"""

import dis
from collections.abc import Callable, Iterable
from functools import lru_cache
from threading import local
from types import CodeType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


def origin_of(function: Any) -> str:
    """The Python module of a function, method, partial or callable object."""
    function = getattr(function, "func", function)  # functools.partial
    function = getattr(function, "__func__", function)
    return getattr(function, "__module__", None) or type(function).__module__


def call_state(module: nn.Module) -> tuple:
    """Changes when a forward of this module's own, or a hook that may change values, is put on or taken off; () without any.

    Hooks of libraries that only gather, place or observe come and go; each would have the weights measured again.
    """
    own = module.__dict__
    hooks, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    if not hooks and not before and "forward" not in own:
        return ()
    found = (*_others(hooks), None, *_others(before), id(own["forward"]) if "forward" in own else None)
    return () if found == (None, None) else found


_KNOWN = _TRUSTED | {"liger_kernel", "apex"}
"""Packages whose norms and rotary embeddings keep no factor of their own beside those that are read off them."""


def is_known(kind: type) -> bool:
    """Whether a class, or the one that a wrapper such as FSDP2's derives from, is of a package that we read."""
    return kind.__module__.partition(".")[0] in _KNOWN


def own_numbers(module: nn.Module) -> tuple:
    """Changes when a buffer, a number or a tensor of a module is written whose class is nobody's we know; else ()."""
    if is_known(type(module)):
        return ()
    found: list[object] = []
    for name, value in (*vars(module).items(), *module._buffers.items()):
        if isinstance(value, Tensor):
            found += name, value.data_ptr(), object() if value.is_inference() else value._version
        elif isinstance(value, int | float | str) and name != "training":
            found += name, value
    return tuple(found)


def hooks_before(module: nn.Module) -> tuple[int, ...]:
    """Numbers of the hooks before a module's forward that may change values; no two hooks ever have one number."""
    hooks = module.__dict__["_forward_pre_hooks"]
    return tuple(_others(hooks)) if hooks else ()


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
    return code is not None and _code_returns_nothing(code)


@lru_cache(maxsize=256)
def _code_returns_nothing(code: CodeType) -> bool:
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


def watch_hooks(module: nn.Module, where: str, before_only: bool = False) -> None:
    """From now on refuse, in the forward in which it happens, that hooks of others change what goes in or comes out.

    No hook is run for a look: one that observes must not see rows that are none. Two hooks of ours enclose the others instead.

    Args:
        where: names the module in messages.
        before_only: watch hooks before the forward alone.
    """
    if not module._forward_pre_hooks and not module._forward_hooks:
        return
    before = _others(module._forward_pre_hooks)
    after = {} if before_only else _others(module._forward_hooks)
    watch = _watches.get(module)
    if watch is not None:
        if watch.numbers == {*before, *after}:
            return
        watch.remove()
    if before or after:
        _watches[module] = Watch(module, where, before, after)
    else:
        _watches.pop(module, None)


def release_watches(modules: Iterable[nn.Module]) -> None:
    """Take our hooks off these modules again."""
    for module in modules:
        if (watch := _watches.pop(module, None)) is not None:
            watch.remove()


class Watch:
    """Two hooks of ours around those of others, before a module's forward, after it, or both.

    Args:
        before, after: hooks of others by number.
    """

    def __init__(self, module: nn.Module, where: str, before: dict[int, Callable], after: dict[int, Callable]):
        self.where, self.numbers = where, {*before, *after}
        self.names = ", ".join(sorted({origin_of(hook) for hook in (*before.values(), *after.values())}))
        self.seen = local()  # the tensor and its count of writes, by thread
        self.handles: list[RemovableHandle] = []
        if before:
            for act, prepend in ((self.keep_input, True), (self.compare_input, False)):
                self.handles.append(module.register_forward_pre_hook(act, prepend=prepend, with_kwargs=True))
        if after:
            self.handles.append(module.register_forward_hook(self.keep_output, prepend=True))
            self.handles.append(module.register_forward_hook(self.compare_output))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _keep(self, value: Any) -> None:
        self.seen.value = value, _writes(value)

    def _compare(self, value: Any) -> None:
        kept, writes = self.seen.value
        self.seen.value = None, None
        if writes != _writes(kept) or not (value is kept or _same(value, kept)):
            raise UnsupportedModelError(
                f"{self.where} has a hook of {self.names} that changes values, which no weight bounds. Remove the hook, or "
                "unpatch the model"
            )

    def keep_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep(_tokens(args, kwargs))

    def compare_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._compare(_tokens(args, kwargs))

    def keep_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._keep(output)

    def compare_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._compare(output)


_watches: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def _others(hooks: dict[int, Callable]) -> dict[int, Callable]:
    """Hooks that may change values, by number."""
    return {
        number: hook
        for number, hook in hooks.items()
        if origin_of(hook).partition(".")[0] not in _TRUSTED and not returns_nothing(hook)
    }


def _tokens(args: tuple, kwargs: dict) -> tuple:
    """What a norm, a projection or an attention module takes first, and the angles of an attention's rotation."""
    first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return first, kwargs.get("position_embeddings")


def _writes(value: Any) -> Any:
    """Counts of writes to a tensor, or to those of a tuple; None for what has none."""
    if isinstance(value, tuple):
        return tuple(map(_writes, value))
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _same(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    if isinstance(value, tuple) and isinstance(expected, tuple):
        return len(value) == len(expected) and all(map(_same, value, expected))
    whole = isinstance(value, Tensor) and isinstance(expected, Tensor) and value.shape == expected.shape
    return whole and torch.equal(value, expected)
