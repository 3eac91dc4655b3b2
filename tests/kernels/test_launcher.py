"""Launches that skip Triton's Python must hand the same compiled code the same arguments as Triton's own do."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels.backend import TRITON_INSTALLED

from .fused_cases import CASES, operands, run

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

# Compiles for a Hopper GPU that is not there, and records what its driver is given.
SCRIPT = '''
import gc
import itertools
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor
from hf_geoscale.kernels import launcher

launches, loaded, unloaded = [], itertools.count(1), []


class Launcher:
    def __init__(self, source, metadata): pass
    def __call__(self, *arguments): launches.append(arguments)


class Driver:
    launcher_cls, device = Launcher, 0
    class utils:
        def get_device_properties(device): return {"max_shared_mem": 2**17}
        def load_binary(*_): return "module", next(loaded), 0, 0, 1024
        def unload_module(module): unloaded.append(module)  # from Triton 3.9 on
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return self.device
    def get_current_stream(self, device): return 7


@launcher.DirectKernel
@triton.jit
def kernel(tiles, p_in, p_maybe, p_out, n, factor, FIXED: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(p_in + columns * n) * factor
    if SECOND:
        x += tl.load(p_maybe + columns) + tiles.load([0, 0]).sum()
    tl.store(p_out + columns + FIXED, x)


def of(x):
    """An argument, so that two of them compare."""
    if hasattr(x, "block_shape"):
        return type(x), x.base.data_ptr(), x.base.dtype, list(x.shape), list(x.strides), list(x.block_shape), x.padding
    return (type(x), x.data_ptr(), x.dtype) if isinstance(x, torch.Tensor) else (type(x), x)


def launched(follow, x, maybe, n, factor, tile, **options):
    """What the driver gets: grid, stream, function, metadata and arguments, without what only hooks read."""
    launcher._FOLLOWED = follow
    rows, make = x.view(-1, 16), TensorDescriptor.from_tensor
    tiles = launcher.descriptor(rows, (tile, 16), make) if follow else make(rows, [tile, 16])
    kernel[2, 3](tiles, x, maybe, out, n, factor, 0, SECOND=maybe is not None, BLOCK=32, **options)
    return [of(argument) for i, argument in enumerate(launches.pop()) if i not in (6, 7, 8)]


if not launcher._FOLLOWED:
    raise SystemExit("skip: launches of this Triton are not followed")
triton.runtime.driver.set_active(Driver())
memory, out = torch.zeros(4097), torch.zeros(64)
x, odd = memory[:4096], memory[1:]
calls = [
    (x, None, 3, 0.5, 16), (x, None, 1, 0.5, 16), (x, None, 16, 0.5, 16), (x, None, 3, 2.0, 16), (x, out, 3, 0.5, 16),
    (x, odd, 3, 0.5, 16), (x, out, 2**40, 0.5, 16), (x.half(), None, 3, 0.5, 16), (x, None, 3, 0.5, 32),
    (x[:1024], None, 3, 0.5, 16), (x, out.half(), 3, 0.5, 16),
]
functions = set()
for call, options in [*((call, {}) for call in calls), (calls[0], {"num_warps": 8})]:
    ordinary, first, direct = [launched(follow, *call, **options) for follow in (False, True, True)]
    assert ordinary == first == direct, (call, ordinary, direct)
    functions.add(direct[4][1])
assert functions == set(range(1, 11)), functions  # neither another factor nor another length compiles anything
half = launcher.descriptor(x.half().view(-1, 16), (16, 16), TensorDescriptor.from_tensor)
assert half.tile[1] == torch.float16, "descriptors of two dtypes pass for one"
try:  # as Triton's own constructor
    launched(True, odd, None, 3, 0.5, 16)
except AssertionError as error:
    assert "16-byte aligned" in str(error)
else:
    raise SystemExit("an unaligned base was taken")

kernel.kernel.device_caches.clear()  # as a reload of Triton's driver does
gc.collect()
launched(True, *calls[0])
assert not unloaded, "a kernel that is still launched was unloaded"

kept = dict(kernel._known)
Driver.device = 1
launched(True, *calls[0])
assert len(kernel._known) == len(kept) + 1, "another device shares a compiled kernel"
Driver.device = 0
ordinary = []
through = kernel.kernel.run
kernel.kernel.run = lambda *a, **k: (ordinary.append(1), through(*a, **k))[1]
launched(True, *calls[0])
assert not ordinary, "a known specialisation went through Triton"
hook = lambda metadata: None
triton.knobs.runtime.launch_enter_hook.add(hook)
launched(True, *calls[0])
assert len(ordinary) == 1, "a profiler's hook was passed over"
triton.knobs.runtime.launch_enter_hook.remove(hook)
kernel.kernel.add_pre_run_hook(lambda *a, **k: None)
launched(True, *calls[0])
assert len(ordinary) == 2, "a kernel's own hook was passed over"
launcher.CAPACITY = len(kernel._known)
kernel.kernel.pre_run_hooks.clear()
launched(True, x, None, 5, 0.5, 16)
assert len(kernel._known) == 1, "the table grows without end"
'''


def test_arguments_are_those_of_an_ordinary_launch(tmp_path):
    script = tmp_path / "launches.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]


def packed_and_rotated(device: torch.device) -> list[torch.Tensor]:
    """O and the one gradient of a fused projection, with RoPE in the kernels."""
    draw = torch.Generator().manual_seed(7)
    packed = torch.randn(1, 131, 4 * 64, generator=draw).to(device, torch.bfloat16).requires_grad_()
    q, k, v = packed.unflatten(2, (4, 64)).transpose(1, 2).split((2, 1, 1), dim=1)
    rotary = tuple(torch.rand(2, 1, 131, 32, generator=draw).to(device))
    scales = {
        f"{n}_quant_scale": torch.full((x.shape[1],), 16.0, device=device)
        for n, x in zip("qkv", (q, k, v), strict=True)
    }
    out = fp8_attention(q, k, v, packed=packed, rotary=rotary, **scales, backend="triton")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), packed)]


@pytest.mark.gpu
def test_results_are_those_of_ordinary_launches(monkeypatch):
    """One call after the other, shapes and options changing, on every device there is."""
    from hf_geoscale.kernels import launcher

    assert launcher._FOLLOWED, "launches of this Triton are not followed"

    def results(case: dict, device: torch.device, unaligned: bool) -> list[torch.Tensor]:
        leaves, options = operands(case)
        leaves = [x.detach().to(device) for x in leaves]
        if unaligned:  # one entry off what the allocator gives
            leaves = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in leaves]
        options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        return run([x.requires_grad_() for x in leaves], options)

    def compare(attend: Callable[[], list[torch.Tensor]], what: object) -> None:
        monkeypatch.setattr(launcher, "_FOLLOWED", False)
        expected = attend()
        monkeypatch.setattr(launcher, "_FOLLOWED", True)
        kept = [expected]
        for _ in range(4):  # as written, recorded, and repeated at addresses of their own
            kept.append(attend())
            assert all(torch.equal(a, b) for a, b in zip(expected, kept[-1], strict=True)), what

    for device in map(torch.device, (f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        compare(partial(packed_and_rotated, device), device)
        for unaligned in (False, True):
            for name, case in CASES.items():
                compare(partial(results, case, device, unaligned), (name, device, unaligned))


def test_a_number_compiled_in_by_its_place_is_not_kept():
    """No part of the key, unlike integers."""
    from hf_geoscale.kernels.launcher import DirectKernel

    kernel = DirectKernel(SimpleNamespace(params=[SimpleNamespace(is_constexpr=True, name="X")]))
    compiled = SimpleNamespace(run=print, function=1, packed_metadata=())
    kernel._remember(("key",), compiled, (0.5,), {})
    assert not kernel._known
    kernel._remember(("key",), compiled, (5,), {})
    assert list(kernel._known) == [("key",)]
