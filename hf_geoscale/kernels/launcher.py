"""Kernel launches without what Triton does in Python for each: binding and specialising thirty arguments costs more than a launch.

The first launch of a specialisation goes through Triton; `DirectKernel` keeps the compiled kernel that it returns and calls it with
the same arguments from then on. `descriptor` does the same for TMA descriptors, which Triton validates one by one. `recording`
keeps launches for `replay`, and `repeatable` takes what is still Python between a compiled kernel and the driver away from them.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import getclosurevars
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs

RELEASES_READ = ((3, 6), (3, 9))
"""Triton releases whose launch path (`runtime/jit.py`, `backends/nvidia/driver.py`) this follows; others launch as Triton does."""

CAPACITY = 1024
"""Specialisations kept of a kernel, and shapes of descriptors: new lengths make new ones. When it is full, all are forgotten."""

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
_FOLLOWED = RELEASE in RELEASES_READ and not knobs.runtime.interpret

logger = logging.getLogger(__name__)


@cache
def _say_that_triton_launches() -> None:
    """Once, where kernels launch as Triton does because nobody read this release."""
    if not _FOLLOWED and not knobs.runtime.interpret:
        releases = " and ".join(f"{major}.{minor}" for major, minor in RELEASES_READ)
        logger.warning(
            "geoscale: Triton %s launches each kernel through its own Python, which takes host time: launches go past it with "
            "Triton %s",
            triton.__version__,
            releases,
        )


def _observed() -> bool:
    """Whether somebody (a profiler, a compiler pass) listens to launches or compilations; Triton serves them."""
    runtime = knobs.runtime
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return True
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def follows() -> bool:
    """Whether launches go past Triton's Python."""
    return _FOLLOWED and not _observed()


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
    owner: Any  # Triton's compiled kernel, which from 3.9 on unloads `function` when it goes


class Launched(NamedTuple):
    """A launch that was made."""

    kernel: Any
    compiled: _Compiled
    grid: tuple[int, ...]
    arguments: tuple  # all


_recordings = threading.local()


@contextmanager
def recording() -> Iterator[list[Launched | None]]:
    """The launches that this thread makes inside, as they come; None for one that went through Triton and left nothing to call."""
    launches: list[Launched | None] = []
    _recordings.launches = launches
    try:
        yield launches
    finally:
        _recordings.launches = None


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
        launches = getattr(_recordings, "launches", None)
        if not _FOLLOWED or self.kernel.pre_run_hooks or _observed():
            _say_that_triton_launches()
            self.kernel[grid](*arguments, **options)
            if launches is not None:
                launches.append(None)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, *specialisation(arguments), *options.items())
        compiled = self._known.get(key)
        if compiled is None:
            self._remember(key, self.kernel[grid](*arguments, **options), arguments, options)
            compiled = self._known.get(key)
        else:
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.get_current_stream(device)
            compiled.run(
                x, y, z, stream, compiled.function, compiled.metadata, None, None, None, *arguments, *compiled.constants
            )
        if launches is not None:
            whole = compiled and Launched(self.kernel, compiled, grid, (*arguments, *compiled.constants))
            launches.append(whole)

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
        self._known[key] = _Compiled(run, function, metadata, tuple(options[p.name] for p in rest), compiled)


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


class Described(NamedTuple):
    """A descriptor among the arguments of a launch to repeat: `at` makes what stands there from the address of its base."""

    base: Tensor
    at: Callable[[int], Any]


class _Address(int):
    """What a descriptor asks of its base."""

    def data_ptr(self) -> int:
        return int(self)


def _described(x: Any) -> Described:
    kind, fields = type(x), {name: value for name, value in vars(x).items() if name != "base"}

    def at(address: int) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(fields, base=_Address(address))
        return made

    return Described(x.base, at)


def repeatable(launched: Launched) -> tuple[Callable[[int, list], object], list]:
    """How to make a launch again: a function of stream and arguments, and its arguments, in which every tensor is to be replaced by
    an address and every `Described` by what it makes of one.

    With Triton 3.6 that function is its C launcher: descriptors become the driver's tensor maps, with their shapes and strides. C
    code takes addresses for tensors, and does not ask the driver about them.
    """
    compiled, arguments = launched.compiled, launched.arguments
    x, y, z = (*launched.grid, 1, 1)[:3]
    listed = [_described(a) if hasattr(a, "block_shape") else a for a in arguments]
    run: Any = compiled.run
    function, metadata = compiled.function, compiled.metadata
    found = _c_launcher(run) if RELEASE == (3, 6) else None
    if found is None:
        rest: tuple = (function, metadata, None, None, None)
        return lambda stream, arguments: run(x, y, z, stream, *rest, *arguments), listed
    launch, expand = found
    rest = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
    return lambda stream, arguments: launch(x, y, z, stream, *rest, *arguments), expand(listed)


def _c_launcher(run: Any) -> tuple[Callable, Callable[[list], list]] | None:
    """The C function behind Triton 3.6's launcher of a kernel, and what makes its arguments of those of the launcher.

    None where a kernel needs scratch memory, or where this is another launcher than the one that was read.
    """
    if getattr(run, "global_scratch_size", True) or getattr(run, "profile_scratch_size", True):
        return None
    if getattr(run.launch, "__closure__", None) is None:  # without descriptors nothing wraps the C function
        return run.launch, list
    try:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        wrapped = getclosurevars(run.launch).nonlocals
        return wrapped["launcher"], partial(_expand, make_tensordesc_arg, wrapped["tensordesc_meta"])
    except (ImportError, KeyError):
        return None


def _expand(make: Callable[[Any, Any], list], layouts: list, arguments: list) -> list:
    """Arguments with the parts that Triton hands to C for each descriptor: a tensor map, shape and strides."""
    expanded: list = []
    remaining = iter(layouts)
    for a in arguments:
        if type(a) is Described:
            layout = next(remaining)
            _, *shape_and_strides = make(a.at(a.base.data_ptr()), layout)
            expanded += Described(a.base, partial(_first, make, a.at, layout)), *shape_and_strides
        else:
            expanded.append(a)
    return expanded


def _first(make: Callable[[Any, Any], list], at: Callable[[int], Any], layout: Any, address: int) -> Any:
    return make(at(address), layout)[0]
