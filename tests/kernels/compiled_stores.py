"""Compiles what stores one tile as rows and as columns, for GPUs that are not there, into a folder: PTX files for `sass`.

python -m tests.kernels.compiled_stores FOLDER
"""

import itertools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from hf_geoscale.kernels.quantize import quantize_kernel
from hf_geoscale.kernels.quantize_gradient import quantize_gradient_kernel
from hf_geoscale.kernels.tiles import padded_head_dim

PTX_VERSION = 87
"""Of CUDA 12.8, so that every ptxas beside Triton 3.6 to 3.9 reads the PTX."""

CAPABILITIES = 89, 90
E4M3 = torch.float8_e4m3fn
SHAPES = ((16, 64, 4), (128, 64, 4), (256, 32, 2))
"""Head dimension, rows of a program, warps."""


@triton.jit
def casting_kernel(p_x, p_rows, p_columns, stride, BLOCK: tl.constexpr):
    """The pattern of triton#11111, with Triton's own cast and without a clamp."""
    rows, dims = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x8 = tl.load(p_x + rows * stride + dims).to(tl.float8e4nv)
    tl.store(p_rows + rows * stride + dims, x8)
    tl.store(p_columns + dims * stride + rows, x8)


class Driver:
    """Of a GPU that is not there."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def quantising(dtype: torch.dtype, dim: int, block: int) -> tuple[tuple, dict]:
    """Arguments of `quantize_kernel` for D channels and BLOCK rows."""
    x, scale, x8 = torch.empty(16, dtype=dtype), torch.empty(16), torch.empty(16, dtype=E4M3)
    pointers = (x, x, x, scale, scale, scale, None, x8, x8, x8, x8, scale, scale, scale, None, None, None, None)
    strides = (1024 * dim, 1024 * dim, dim, 1) * 3 + (0, 0)
    constants = {"D": dim, "DP": padded_head_dim(dim), "TURNED": 0, "INTERLEAVED": False, "NORM": False, "MIX": 0}
    constants |= {"HIGH": True, "COUNT": False, "BLOCK": block}
    return (*pointers, *strides, 0.0, 1, 16, 16, 1024, 1024, 1024), constants


def gradient(dtype: torch.dtype, dim: int, block: int) -> tuple[tuple, dict]:
    """Arguments of `quantize_gradient_kernel`."""
    x, row, x8 = torch.empty(16, dtype=dtype), torch.empty(16), torch.empty(16, dtype=E4M3)
    pointers = (x, x, *(row,) * 6, x8, x8, *(row,) * 6)
    strides = (1024 * dim, 1024 * dim, dim, 1) * 2
    constants = {"GROUP": 2048, "D": dim, "DP": padded_head_dim(dim), "RATIO": True, "BLOCK": block}
    return (*pointers, *strides, 16, 16, 1024, 1024, 16, 0.125, 1.0), constants


def compile_all(folder: Path) -> None:
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(Driver(capability))
        x, x8 = torch.empty(16), torch.empty(16, dtype=E4M3)
        compiled = casting_kernel.warmup(x, x8, x8, 1024, 64, grid=(1,), ptx_version=PTX_VERSION)
        (folder / f"cast-{capability}.ptx").write_text(compiled.asm["ptx"])
        for (dim, block, warps), dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
            for kernel, made in ((quantize_kernel, quantising), (quantize_gradient_kernel, gradient)):
                arguments, constants = made(dtype, dim, block)
                options = {"num_warps": warps, "ptx_version": PTX_VERSION, "grid": (1,)}
                compiled = kernel.warmup(*arguments, **constants, **options)
                name = f"{kernel.__name__}-{capability}-{dim}-{block}-{warps}-{str(dtype).removeprefix('torch.')}.ptx"
                (folder / name).write_text(compiled.asm["ptx"])


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
