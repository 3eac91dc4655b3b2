"""The Hopper kernels run on their own GPU only (test_fused.py); everywhere else they must at least compile for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

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
            print(self.kernel.__name__, len(compiled.asm["cubin"]), compiled.asm["ptx"].count("wgmma.mma_async"))
        return compile


triton.runtime.driver.set_active(Driver())
for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "query_product_kernel"):
    setattr(hopper.launch, name, Compiled(getattr(hopper.launch, name)))
hopper.launch.query_spans = lambda *_: torch.zeros(1, 4, 4, dtype=torch.int32)

heads, kv_heads, length, dim, window = 4, 2, 256, 80, 100
scales = [torch.ones(count) for count in (heads, kv_heads, kv_heads)]
key_range = torch.zeros(1, length, 2, dtype=torch.int32)
call = Call(*scales, key_range, None, 0.125, True, window, 0.0, False, dim, hadamard_signs(128, 16, key_range.device), 16)
e4m3 = torch.float8_e4m3fn
q8, k8 = (torch.zeros(1, count, length, dim, dtype=e4m3) for count in (heads, kv_heads))
q8_columns, k8_columns = (torch.zeros(1, count, dim, length, dtype=e4m3) for count in (heads, kv_heads))
rows, group = torch.zeros(1, heads, length), torch.zeros(1, heads, 1, 4)
out, dk = (torch.zeros(1, count, length, dim, dtype=torch.bfloat16) for count in (heads, kv_heads))
hopper.launch.forward(call, q8, k8, None, k8_columns, out, rows, rows, None, None)
hopper.launch.query_gradient(call, q8, k8, k8_columns, None, None, k8, q8, rows, rows, rows, group, None, out)
hopper.launch.key_gradient(call, q8, q8_columns, k8, None, k8, q8, q8_columns, rows, rows, group, dk, dk)
call = Call(*scales, None, None, 0.125, True, window, 0.0, False, dim, hadamard_signs(128, 16, key_range.device), 16)
tiles = hopper.launch.stored_tiles(call, q8, k8)
hopper.launch.gradients(
    call, tiles, q8, q8_columns, k8, k8_columns, k8, q8, q8_columns, rows, rows, rows, rows, group, out, dk, dk
)
"""


def test_every_kernel_compiles(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in reports] == [
        *(
            "forward_kernel",
            "query_gradient_kernel",
            "key_gradient_kernel",
            "key_gradient_kernel",
            "query_product_kernel",
        )
    ]
    assert all(int(size) > 0 and int(products) > 0 for _, size, products in reports)
