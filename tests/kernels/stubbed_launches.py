"""Kernels that do nothing, launched on the CPU as on a GPU, without Triton's interpreter: what is left is the host's work.

`install` in a process of its own. All down to the launcher of a compiled kernel runs as it is. Launchers are of two kinds:
"wrapped" as Triton 3.6's, a function in C behind Python that makes tensor maps of descriptors, or "whole".
"""

import ctypes
import gc
import itertools
from typing import Any, NamedTuple

import torch
import triton

from hf_geoscale.kernels import backend, fused, hopper, launcher, replay


class Given(NamedTuple):
    """What a launcher got."""

    grid: tuple[int, ...]
    function: str
    arguments: tuple
    contents: list  # the first bytes behind each pointer, at that time


class Map(NamedTuple):
    """A tensor map."""

    base: Any
    fields: tuple


POINTER_MIN = 2**22
"""Integers from here on are addresses: no stride, length or dropout threshold here is as large, and no heap begins lower."""

launches: list[Given] = []
observing = True
"""Whether launches are kept."""


def address(x: Any) -> int | None:
    """Of an argument that is a pointer, or has one."""
    x = x.base if hasattr(x, "block_shape") or isinstance(x, Map) else x
    return x.data_ptr() if hasattr(x, "data_ptr") else None


def launch(
    x, y, z, stream, function, cooperative, pdl, scratch, profile, metadata, launch_metadata, enter, leave, *rest
) -> None:
    if not observing:
        return
    pointers = [a if type(a) is int and a >= POINTER_MIN else address(a) for a in rest]
    contents = [ctypes.string_at(p, 4) if p else None for p in pointers]
    launches.append(Given((x, y, z), function, rest, contents))


def make_tensordesc_arg(x: Any, layout: str, *_) -> list:
    """As Triton's: a tensor map, then shape and strides."""
    fields = tuple(x.shape), tuple(x.strides), tuple(x.block_shape), layout
    return [Map(x.base, fields), *x.shape, *x.strides]


class Whole:
    """A launcher."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    launch = staticmethod(launch)

    def __init__(self, described: list[bool]):
        pass

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, False, False, None, None, *rest)


class Wrapped(Whole):
    def __init__(self, described: list[bool]):
        if not any(described):
            return
        launcher, tensordesc_meta = launch, [f"layout {i}" for i in range(sum(described))]

        def inner(*arguments):
            expanded, layouts = list(arguments[:13]), iter(tensordesc_meta)
            for x, is_descriptor in zip(arguments[13:], described, strict=True):
                expanded += make_tensordesc_arg(x, next(layouts)) if is_descriptor else [x]
            return launcher(*expanded)

        self.launch = inner


LAUNCHERS = {"whole": Whole, "wrapped": Wrapped}


class Kernel:
    """In the place of a Triton kernel; compiles nothing."""

    def __init__(self, kernel: Any, launcher: type[Whole]):
        self.params, self.name, self.launcher = kernel.params, kernel.__name__, launcher
        self.pre_run_hooks: list = []
        self.ordinary = 0  # launches through Triton

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.ordinary += 1
            arguments += tuple(options.pop(p.name) for p in self.params[len(arguments) :])
            kinds = [(str(a.dtype), a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else None for a in arguments]
            function = f"{self.name} {options} {kinds}"  # what Triton specialises on, as far as addresses decide it
            compiled = Compiled(self.launcher([hasattr(a, "block_shape") for a in arguments]), function)
            compiled.run(
                *(*grid, 1, 1)[:3], 7, compiled.function, compiled.packed_metadata, None, None, None, *arguments
            )
            return compiled

        return run


class Compiled:
    packed_metadata = (4, 1, 0)

    def __init__(self, run: Whole, function: str):
        self.run, self.function = run, function


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


DEFINED_IN = (fused, hopper)  # which import every kernel
KERNELS = [x for x in gc.get_objects() if type(x) is launcher.DirectKernel]
ORIGINALS = [kernel.kernel for kernel in KERNELS]


def install(kind: str) -> None:
    """Stub every kernel, with launchers of this kind."""
    import triton.backends.nvidia.driver as nvidia

    nvidia.make_tensordesc_arg = make_tensordesc_arg
    backend.triton_missing = lambda device: None
    triton.runtime.driver.set_active(Driver())
    launcher._FOLLOWED, launcher.RELEASE = True, (3, 6) if kind == "wrapped" else (3, 9)
    replay.forget()
    for kernel, original in zip(KERNELS, ORIGINALS, strict=True):
        kernel.kernel = Kernel(original, LAUNCHERS[kind])
        kernel._known.clear()


def ordinary() -> int:
    """Launches that went through Triton since `install`."""
    return sum(kernel.kernel.ordinary for kernel in KERNELS)


def poison() -> None:
    """Fill what is allocated and not zeroed with bytes 0x7F, without an operation of torch."""

    def poisoned(make):
        def call(*args, **kwargs):
            x = make(*args, **kwargs)
            ctypes.memset(x.untyped_storage().data_ptr(), 0x7F, x.untyped_storage().nbytes())
            return x

        return call

    for owner, name in itertools.product((torch,), ("empty", "empty_like", "empty_strided")):
        setattr(owner, name, poisoned(getattr(owner, name)))
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
