"""The Hopper kernels run on their own GPU only (test_fused.py); everywhere else they must at least compile for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

from .attention_model import hopper_launch

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from hf_geoscale.kernels import hopper
from hf_geoscale.kernels.hadamard import hadamard_signs
from hf_geoscale.kernels.launch import Call

if hopper.launch is None:
    sys.exit("skip: this Triton has no Gluon for Hopper")


class Driver:  # of a Hopper GPU that is not there
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


class Compiled:  # a kernel whose launches only compile
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*args, **options):
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            shared = compiled.metadata.shared
            print(self.kernel.__name__, len(compiled.asm["cubin"]), compiled.asm["ptx"].count("wgmma.mma_async"), shared)
        return compile


triton.runtime.driver.set_active(Driver())
for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "query_product_kernel"):
    setattr(hopper.launch, name, Compiled(getattr(hopper.launch, name)))
hopper.launch.query_spans = lambda *_: torch.zeros(1, 4, 4, dtype=torch.int32)

dim, block, turned = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "turned"
heads, kv_heads, length, window = 4, 2, 256, 100
padded = 64 if dim <= 64 else 128
scales = [torch.ones(count) for count in (heads, kv_heads, kv_heads)]
key_range = torch.zeros(1, length, 2, dtype=torch.int32)
angles = {"cos": torch.zeros(1, length, dim // 2), "sin": torch.zeros(1, length, dim // 2)} if turned else {}
signs = hadamard_signs(padded, block, key_range.device)
e4m3 = torch.float8_e4m3fn
q8, k8 = (torch.zeros(1, count, length, dim, dtype=e4m3) for count in (heads, kv_heads))
q8_columns, k8_columns = (torch.zeros(1, count, dim, length, dtype=e4m3) for count in (heads, kv_heads))
rows, group = torch.zeros(1, heads, length), torch.zeros(1, heads, 1, 4)
out, dk = (torch.zeros(1, count, length, dim, dtype=torch.bfloat16) for count in (heads, kv_heads))
for ranges in (key_range, None):
    call = Call(*scales, ranges, None, 0.125, True, window, 0.0, False, dim, signs, block, **angles)
    tiles = hopper.launch.stored_tiles(call, q8, k8)
    if tiles is None:
        hopper.launch.forward(call, q8, k8, None, k8_columns, out, rows, rows, None, None)
        hopper.launch.query_gradient(call, q8, k8, k8_columns, None, None, k8, q8, rows, rows, rows, group, None, out)
        hopper.launch.key_gradient(call, q8, q8_columns, k8, None, k8, q8, q8_columns, rows, rows, group, dk, dk)
    else:
        hopper.launch.gradients(
            call, tiles, q8, q8_columns, k8, k8_columns, k8, q8, q8_columns, rows, rows, rows, rows, group, out, dk, dk
        )
"""

SHARED_MEMORY = 232_448
"""Bytes that one program may take on compute capability 9.0 (CUDA C++ Programming Guide, technical specifications)."""


@pytest.mark.parametrize(("dim", "block", "turned"), [(80, 16, False), (128, 128, True), (64, 64, True)])
def test_every_kernel_compiles(tmp_path, dim, block, turned):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(dim), str(block), "turned" if turned else ""]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [line.split() for line in done.stdout.splitlines() if "_kernel " in line]
    own = ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
    assert [name for name, *_ in reports] == own + (
        ["key_gradient_kernel", "query_product_kernel"] if dim > 64 else own
    )
    assert all(int(size) > 0 and int(products) > 0 for _, size, products, _ in reports)
    assert all(int(shared) <= SHARED_MEMORY for *_, shared in reports)


def test_a_promotion_is_whole_tiles():
    launch = hopper_launch()
    for promotion in (32, 96):
        with pytest.raises(ValueError, match=f"multiple of the 64 positions of a tile, got {promotion}"):
            launch.Ring(64, 3, 2, promotion)
