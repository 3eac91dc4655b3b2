"""Gram matrices of weights: the kernel compiles, with the launch shape that it gets there, for GPUs that this machine lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_geoscale.kernels import gram

capability, kilobytes = int(sys.argv[1]), int(sys.argv[2])
gram._shared_memory = lambda device: 1024 * kilobytes
torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
gram.stream_of, table = (lambda device: 0), gram._table
gram._table = lambda entries, device, stream: table(entries, torch.device("cpu"), stream)
rows = torch.zeros(1, 128, 4096, dtype=torch.bfloat16)
((_, _, constants),) = gram.tables([(rows, rows[0, 0], 0)], torch.device("cuda", 0)).launches
constants = constants | gram.shape_of(128) | {"stride_w": 1, "PART": 1024}
warps = constants.pop("num_warps")
names = gram.gram_kernel.kernel.arg_names
signature = {"p_table": "*i64", "p_gram": "*fp32", "width": "i32", "stride_d": "i32"}
source = ASTSource(
    gram.gram_kernel.kernel,
    {name: signature.get(name, "constexpr") for name in names},
    constants,
    {(i,): [["tt.divisibility", 16]] for i in range(4)},
)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
ptx = compiled.asm["ptx"]
rounded = ptx.count("cvt.rn.bf16x2.f32") * 2 * 32 * warps / (128 * constants["BLOCK"])
print(constants["BLOCK"], compiled.metadata.shared <= 1024 * kilobytes, round(rounded))
"""


@pytest.mark.cpu
@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
@pytest.mark.parametrize(
    ("capability", "kilobytes", "columns"),
    [(80, 163, 128), (89, 99, 64), (90, 227, 128), (100, 227, 128), (120, 99, 64)],
)
def test_it_compiles_and_fits(capability, kilobytes, columns, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), str(kilobytes)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    block, fits, rounded = done.stdout.split()
    assert (int(block), fits) == (columns, "True")
    if capability == 90:
        assert rounded == "1", "a tile is not rounded once, by the opaque instruction"
