"""dS8 that the kernel of dK and dV stores for dQ: the same gradients as when dQ computes its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels.backend import TRITON_INSTALLED

from ..tolerances import FLIPPED_ROUNDINGS
from .fused_cases import DEVICE, NEEDS_KERNELS, operands
from .samples import relative

HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
E4M3 = torch.float8_e4m3fn

POLICY = """
import sys
import torch
from hf_geoscale.kernels import hopper
from hf_geoscale.kernels.launch import Call

if hopper.launch is None:
    sys.exit("skip: this Triton has no Gluon for Hopper")


def heads_stored(length, heads=32, kv_heads=8, dim=128, batch=1, keys=None, causal=True, window=0, ranges=None):
    meta = [torch.ones(n, device="meta") for n in (heads, kv_heads, kv_heads)]
    call = Call(*meta, ranges, None, 0.1, causal, window, 0.0, False, dim, None, 0)
    q8 = torch.empty(batch, heads, length, dim, device="meta")
    return hopper.launch.heads_stored(call, q8, torch.empty(batch, kv_heads, keys or length, dim, device="meta"))


print([heads_stored(length) for length in (1, 4096, 8192, 16384, 32768, 65536, 131072)])
print([heads_stored(4096, batch=3), heads_stored(4096, kv_heads=32), heads_stored(32768, heads=28, kv_heads=4)])
print([heads_stored(4096, dim=dim) for dim in (64, 80, 96)])
others = {"keys": 5000}, {"causal": False}, {"ranges": torch.ones(1)}
print([heads_stored(length, window=4096) for length in (4096, 32768, 131072)])
print([heads_stored(4096, **other) for other in others])

from types import FunctionType
from hf_geoscale.kernels.hopper import logit_gradient
names = {"ROWS": 64}
for name in ("tiles_of_row", "tile_number"):  # integers here as in the kernels
    names[name] = FunctionType(getattr(logit_gradient, name).fn.__code__, names)
wrong = []
for length in (1, 64, 65, 700, 1088):
    tiles = -(-length // 64)
    for window in (0, 1, 63, 64, 65, 66, 129, 300, length):
        size = hopper.launch._stored_bytes(length, window, 3) // 64**2
        seen = {(row // 64, key // 64) for row in range(0, length) for key in {row, max(row - window + 1, 0) if window else 0}}
        seen = {(r, k) for r, least in {r: min(k for s, k in seen if s == r) for r, _ in seen}.items() for k in range(least, r + 1)}
        found = [names["tile_number"](head, r, k, tiles, window, window > 0) for head in range(3) for r, k in seen]
        if len(set(found)) < len(found) or not 0 <= min(found) <= max(found) < size:
            wrong.append((length, window))
print(wrong)

allocated, empty = [], torch.empty


def short(rows, columns, **options):
    allocated.append(rows * columns)
    if rows * columns > limit:
        raise torch.OutOfMemoryError
    return empty(rows, columns, **options)


torch.empty, hopper.launch.heads_stored = short, lambda *_: 8
q8 = empty(1, 32, 128, 128, dtype=torch.float8_e4m3fn)
meta = [torch.ones(n) for n in (32, 8, 8)]
call = Call(*meta, None, None, 0.1, True, 0, 0.0, False, 128, None, 0)
for limit in (2**20, 2**17, 2**10):
    allocated.clear()
    tiles = hopper.launch.stored_tiles(call, q8, q8[:, :8])
    print(tiles is not None and list(tiles.shape), allocated)
"""


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_heads_are_stored_while_memory_is_little_beside_the_queries():
    """At most 34 bytes an entry of the queries, in parts of about the same number of heads; never where dQ must compute its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", POLICY], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    *found, wrong, roomy, short, full = done.stdout.splitlines()
    assert wrong == "[]", f"tiles share a place or lie outside for (length, window) in {wrong}"
    head = 4 * 3 * 64 * 64  # three tiles of four query heads
    assert roomy == f"[{8 * head // 64}, 64] [{8 * head}]"
    assert short == f"[{2 * head // 64}, 64] [{8 * head}, {4 * head}, {2 * head}]"
    assert full == f"False [{8 * head}, {4 * head}, {2 * head}, {head}]"
    assert found == ["[8, 8, 8, 4, 2, 1, 0]", "[24, 32, 1]", "[0, 8, 8]", "[8, 8, 8]", "[0, 0, 0]"]


class TestOperands:
    """What the product of dS8 and k8 takes, written by the portable kernels."""

    pytestmark = NEEDS_KERNELS

    def test_columns_of_keys_are_in_the_order_of_pairs(self):
        from hf_geoscale.kernels.quantize import transpose_kernel

        q8, k8 = (torch.randn(1, heads, 64, 16, device=DEVICE).to(E4M3) for heads in (2, 1))
        columns = [torch.zeros(1, heads, 16, 64, dtype=E4M3, device=DEVICE) for heads in (2, 1, 1)]
        v8 = torch.zeros_like(columns[1])
        transpose_kernel[4, 1](
            q8, k8, k8, v8, *columns, torch.zeros_like(k8), 1, 2, 1, 64, 64, 64, 64, 16, 16, False, True, 64
        )
        order = [16 * block + i + 8 * half for block in range(4) for i in range(8) for half in range(2)]
        assert torch.equal(columns[1].float(), k8.float()[:, :, order].mT)
        assert sorted(order) == list(range(64))
        assert not torch.equal(columns[0].float(), q8.float()[:, :, order].mT)


STORED_CASES = {
    "one tile": {"rows": 33},
    "whole tiles": {"rows": 256, "heads": 4, "kv_heads": 2, "batch": 2},
    "a block without keys in its second half": {"rows": 200, "heads": 4},
    "dim 80": {"rows": 333, "dim": 80, "heads": 6, "kv_heads": 2},
    "two groups of rows, dim 96": {"rows": 2111, "dim": 96, "heads": 4, "kv_heads": 2},
    "window": {"rows": 1100, "window": 300, "heads": 4, "kv_heads": 2},
    "window of whole tiles": {"rows": 777, "window": 256},
    "window of one key more": {"rows": 777, "window": 257},
    "window of one": {"rows": 400, "window": 1},
    "window of all": {"rows": 400, "window": 400},
    "multi-head": {"rows": 1100, "heads": 3, "kv_heads": 3},
    "rows without a gradient": {"rows": 700, "silent": slice(130, 330)},
    "rotary": {"rows": 700, "rotary": 64},
    "rotary, interleaved": {"rows": 700, "rotary": 64, "interleaved": True},
}


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU, which has kernels of its own")
class TestGradients:
    def gradients(self, case: dict, stored, monkeypatch) -> list[torch.Tensor]:
        """dQ, dK, dV, in memory that is NaN where nobody writes."""
        from hf_geoscale.kernels import hopper, replay

        monkeypatch.setattr(hopper.launch, "heads_stored", stored)
        replay.forget()
        case = {"dim": 128} | case
        turned, interleaved, silent = (
            case.pop(*x) for x in (("rotary", 0), ("interleaved", False), ("silent", slice(0)))
        )
        leaves, options = operands(case)
        if turned:
            angles = torch.randn(1, case["rows"], turned, device=DEVICE)
            options |= {"rotary": (angles.cos(), angles.sin()), "rotary_interleaved": interleaved}
        poison = [torch.full((2**n,), 0x7F, dtype=torch.uint8, device=DEVICE) for n in (20, 20, 26)]
        del poison
        out = fp8_attention(*leaves, **options, backend="triton")
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        grad[:, :, silent] = 0
        return list(torch.autograd.grad(out, leaves, grad))

    @pytest.mark.parametrize("case", STORED_CASES)
    def test_they_are_those_of_a_dq_that_computes_its_own(self, case, monkeypatch):
        from hf_geoscale.kernels.hopper import launch

        asked = []

        def counted(*given, stored=launch.heads_stored):
            asked.append(stored(*given))
            return asked[-1]

        torch.manual_seed(0)
        *_, dk, dv = own = self.gradients(STORED_CASES[case], lambda *_: 0, monkeypatch)
        torch.manual_seed(0)
        found = self.gradients(STORED_CASES[case], counted, monkeypatch)
        assert asked[0] > 0
        assert all(x.isfinite().all() for x in found)
        assert torch.equal(found[1], dk)
        assert torch.equal(found[2], dv)
        assert (
            relative(found[0], own[0]) < FLIPPED_ROUNDINGS
        )  # of dS8, whose row's scale is multiplied in at another place
        monkeypatch.undo()
        torch.manual_seed(0)
        parts = self.gradients(STORED_CASES[case], lambda *_: 1, monkeypatch)
        assert all(torch.equal(x, y) for x, y in zip(found, parts, strict=True)), "a head at a time is another result"
