"""Memory faults on purpose, to see that a checker of memory finds them before it is trusted to find none.

    python benchmarks/planted_faults.py         # every fault under every checker, as a Markdown table; CPU, Linux with glibc
    python benchmarks/launch_stress.py --plant freed_sizes          # one fault in the middle of the stress

Checkers are set from outside, before Python starts (`CHECKERS`). MALLOC_CHECK_ without the preloaded library does nothing since
glibc 2.34.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SIZES = (1, 8192, 4096)
"""Of a view, as autograd keeps them: 24 bytes."""

CHECKERS: dict[str, dict[str, str]] = {
    "none": {},
    "Python's": {"PYTHONMALLOC": "debug"},
    "glibc's": {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"},
}
"""Environment variables of each checker."""


_malloc, _free = ctypes.pythonapi.PyMem_RawMalloc, ctypes.pythonapi.PyMem_RawFree
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
_free.restype, _free.argtypes = None, (ctypes.c_void_p,)
"""The C library's malloc and free as libpython links them: a lookup by name passes the preloaded checker over."""

_Vector = ctypes.c_int64 * len(SIZES)


def _vector() -> int:
    """Address of `SIZES` in a block of the C library's."""
    address = _malloc(ctypes.sizeof(_Vector))
    _Vector.from_address(address)[:] = SIZES
    return address


def freed_sizes() -> None:
    """View a tensor with sizes that were freed: the symptom of docs/freed_memory.md."""
    flat, read, address = torch.empty(SIZES, device="meta").view(-1), _Vector(), _vector()
    _free(address)
    ctypes.memmove(read, address, ctypes.sizeof(read))
    flat.view(list(read))


def overrun() -> None:
    """Write one byte more than was asked for, then free."""
    address = _vector()
    ctypes.c_uint8.from_address(address + ctypes.sizeof(_Vector)).value ^= 0xFF
    _free(address)


def freed_twice() -> None:
    """Free a block twice, with a free of another in between."""
    first, second = _vector(), _vector()
    for address in (first, second, first):
        _free(address)


def released_object() -> None:
    """Give up a reference to a size that is still held, so that its memory goes, and read it."""
    rows = int(str(SIZES[1]))
    flat = torch.empty(SIZES, device="meta").view(-1)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(rows))
    flat.view(SIZES[0], rows, SIZES[2])


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant for plant in (freed_sizes, overrun, freed_twice, released_object)
}


def outcome(plant: str, checker: str) -> str:
    """How a process with this fault ends."""
    command = [sys.executable, str(Path(__file__)), plant]
    done = subprocess.run(command, env=os.environ | CHECKERS[checker], capture_output=True, text=True, errors="replace")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode > 0:
        return said[-1]
    if done.returncode == 0:
        return "not noticed"
    return f"killed by signal {-done.returncode}" + (f": {said[0]}" if said else "")


def table() -> str:
    lines = [f"| fault | {' | '.join(CHECKERS)} |", "|---" * (1 + len(CHECKERS)) + "|"]
    lines += [f"| {name} | {' | '.join(outcome(name, checker) for checker in CHECKERS)} |" for name in PLANTS]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        PLANTS[sys.argv[1]]()
    else:
        print(table())
