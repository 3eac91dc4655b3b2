"""A tile's product keeps an accumulator of its own, whatever the GPU: compiled for each, and read. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

KERNEL = """
import triton
import triton.language as tl
from hf_geoscale.kernels.tile import add_apart

@triton.jit
def sum_tiles(p_x, p_y, p_out, n_tiles, APART: tl.constexpr):
    rows, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((64, 64), tl.float32)
    for i in range(n_tiles):
        x, y = tl.load(p_x + rows * 64 + columns + i * 64), tl.load(p_y + rows * 64 + columns + i * 64)
        if APART:
            total = add_apart(total, 1.0, tl.dot(x, y))
        else:
            total += tl.dot(x, y)
    tl.store(p_out + rows * 64 + columns, total)
"""

COMPILE = """
import json, re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tiles_kernel import sum_tiles

types = {"p_x": "*fp8e4nv", "p_y": "*fp8e4nv", "p_out": "*fp32", "n_tiles": "i32"}
found = {}
for capability in map(int, sys.argv[1:]):
    for apart in (True, False):
        source = ASTSource(sum_tiles, types, {"APART": apart})
        text = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ttgir"]
        (third,) = re.findall(r"(?:tt\\.dot|warp_group_dot) %\\S+, %\\S+, (%\\w+)", text)
        found[f"{capability} {apart}"] = third.startswith("%cst")
print(json.dumps(found))
"""


def test_only_an_fma_keeps_the_matrix_units_sum_apart(tmp_path):
    """After `dot`, Triton makes an addition the product's accumulator on compute capability 8.9 and 12.0, though not on 9.0."""
    (tmp_path / "tiles_kernel.py").write_text(KERNEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}",
    }
    command = [sys.executable, "-c", COMPILE, "89", "90", "120"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    starts_at_zero = json.loads(done.stdout.splitlines()[-1])
    assert all(starts_at_zero[f"{capability} True"] for capability in (89, 90, 120)), starts_at_zero
    assert not starts_at_zero["89 False"], "a plain addition would do now"
