"""Kernel launches without what Triton does in Python for each: binding and specialising thirty arguments costs more than a launch.

The first launch of a specialisation goes through Triton; `DirectKernel` keeps the compiled kernel that it returns and calls it with
the same arguments from then on. `descriptor` does the same for TMA descriptors, which Triton validates one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs

RELEASES_READ = ((3, 6), (3, 9))
"""Triton releases whose launch path (`runtime/jit.py`, `backends/nvidia/driver.py`) this follows; others launch as Triton does."""

CAPACITY = 1024
"""Specialisations kept of a kernel, and shapes of descriptors: new lengths make new ones. When it is full, all are forgotten."""

_FOLLOWED = tuple(map(int, triton.__version__.split(".")[:2])) in RELEASES_READ and not knobs.runtime.interpret


def _observed() -> bool:
    """Whether somebody (a profiler, a compiler pass) listens to launches or compilations; Triton serves them."""
    runtime = knobs.runtime
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return True
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _kind(x: Any) -> Any:
    """What decides which code Triton compiles for an argument that is no integer, or more."""
    kind = type(x)
    if x is None or kind is float:  # no value of it is compiled in
        return kind
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return getattr(x, "tile", None) or (kind, x)  # a descriptor, or what is no number


def specialisation(arguments: tuple) -> list:
    """A key that two lists of arguments share only if Triton compiles the same code for both.

    Integers stand for themselves, which is more than their divisibility by 16 and their equality to 1; of a tensor its dtype and
    whether its address is a multiple of 16, of a descriptor what it was made with.
    """
    return [
        x if (kind := type(x)) is int else (x.dtype, x.data_ptr() % 16 == 0) if kind is Tensor else _kind(x)
        for x in arguments
    ]


class _Compiled(NamedTuple):
    run: Callable
    function: Any
    metadata: Any
    constants: tuple  # compile-time arguments after the positional ones


class DirectKernel:
    """A Triton or Gluon kernel, launched as ever: `kernel[grid](*arguments, **constants)`. Everything else is the kernel's.

    Keywords are compile-time arguments and launch options. Source, globals and debugging switches of a kernel are taken for fixed
    after its first launch; Triton compares them at every one.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._known: dict[tuple, _Compiled] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "kernel":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments, **options) -> None:
        if not _FOLLOWED or self.kernel.pre_run_hooks or _observed():
            self.kernel[grid](*arguments, **options)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, *specialisation(arguments), *options.items())
        compiled = self._known.get(key)
        if compiled is None:
            self._remember(key, self.kernel[grid](*arguments, **options), arguments, options)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.metadata, None, None, None, *arguments, *compiled.constants
        )

    def _remember(self, key: tuple, compiled: Any, arguments: tuple, options: dict[str, Any]) -> None:
        """Keep a compiled kernel, if it is one that can be called directly."""
        rest = self.kernel.params[len(arguments) :]
        if not all(p.is_constexpr and p.name in options for p in rest):
            return
        if any(p.is_constexpr and type(x) is float for p, x in zip(self.kernel.params, arguments, strict=False)):
            return  # compiled in, but no part of the key
        run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
        if run is None or function is None or metadata is None:
            return
        if len(self._known) >= CAPACITY:
            self._known.clear()
        self._known[key] = _Compiled(run, function, metadata, tuple(options[p.name] for p in rest))


_fields: dict[tuple, tuple[type, dict[str, Any]]] = {}  # of descriptors, without their base


def descriptor(
    x: Tensor,  # contiguous, 16-byte aligned
    block: tuple[int, ...],
    make: Callable[[Tensor, list[int]], Any],
) -> Any:
    """A TMA descriptor of x as (…, last dimension), or flat for a block of one dimension. Validated once a shape.

    Args:
        make: Triton's constructor of the view and the block's shape; nothing else may decide what it makes but their dtype.
    """
    key = (make, x.shape, x.dtype, block)
    known = _fields.get(key)
    usual = x.is_contiguous() and x.data_ptr() % 16 == 0
    if known is None or not usual:
        made = make(x.view(-1, x.shape[-1]) if len(block) > 1 else x.view(-1), list(block))
        made.tile = make, x.dtype, block
        if usual:
            if len(_fields) >= CAPACITY:
                _fields.clear()
            _fields[key] = type(made), {name: value for name, value in vars(made).items() if name != "base"}
        return made
    kind, fields = known
    made = object.__new__(kind)
    made.__dict__.update(fields, base=x)
    return made
