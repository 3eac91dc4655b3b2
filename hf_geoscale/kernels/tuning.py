"""Measure launch shapes for a GPU or head dimension that `tiles.TABLE` has no row for."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from .backend import TRITON_INSTALLED, resolve_backend
from .tiles import DEFAULTS, TABLE, Tile, Tiles, padded_head_dim, tiles_for

if TRITON_INSTALLED:
    import triton

    from . import fused

CANDIDATES = tuple(
    Tile(rows, keys, warps, stages)
    for (rows, keys, warps), stages in product(
        ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 8)), (1, 2, 3)
    )
)


def _milliseconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def _calls(
    dim: int, high: bool, length: int, heads: int, kv_heads: int, dropout_p: float
) -> dict[str, Callable[[], object]]:
    """The op whose time each tile decides, on random causal input."""
    q, grad = torch.randn(2, 1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16)

    def scale(count: int) -> Tensor:
        return torch.full((count,), 448 / (2 * dim**0.5), device="cuda")

    scales = (scale(heads), scale(kv_heads), scale(kv_heads))
    options = (dim**-0.5, 0.0, True, 0, dropout_p, True)
    seed = torch.zeros((), dtype=torch.int64, device="cuda") if dropout_p else None

    def forward():
        return fused.attention_forward(q, k, v, *scales, None, seed, None, None, *options, high, False, False)

    saved = forward()[:8]

    def backward():
        return fused.attention_backward(grad, *saved, *scales, None, seed, None, None, *options, *[torch.bfloat16] * 3)

    return {"forward": forward, "query_gradient": backward, "key_gradient": backward}


def tune_tiles(head_dim: int, *, high: bool = False, length: int = 8192, heads: int = 32, kv_heads: int = 8) -> Tiles:
    """Time launch shapes of the portable kernels on the current GPU and use the fastest for the rest of this process.

    Where the Hopper kernels, whose shapes are fixed, run a head dimension, the portable ones take its calls with dropout: those
    are timed.

    Args:
        head_dim: the model's head dimension; its padding to a power of two shares the result.
        high: for precision="high".
        length, heads, kv_heads: shape of the causal self-attention that is timed.
    Returns:
        the fastest of `CANDIDATES` for each kernel; print it to extend `tiles.TABLE`. Shapes that do not fit the GPU are skipped.
    Raises:
        RuntimeError: no GPU that the fused kernels run on.
    """
    device = torch.device("cuda")
    resolve_backend("triton", device)
    padded = padded_head_dim(head_dim)
    row = (torch.cuda.get_device_capability(device), padded, high)
    best = tiles_for(device, head_dim, high)
    before = TABLE.get(row)
    dropout_p = 0.1 if fused.hopper.runs(device, padded) and not high else 0.0
    try:
        TABLE[row] = best
        try:
            calls = _calls(head_dim, high, length, heads, kv_heads, dropout_p)
        except triton.runtime.errors.OutOfResources:
            TABLE[row] = best = DEFAULTS[padded]
            calls = _calls(head_dim, high, length, heads, kv_heads, dropout_p)
        for kernel, call in calls.items():
            times = {}
            for tile in (getattr(best, kernel), *CANDIDATES):
                TABLE[row] = replace(best, **{kernel: tile})
                try:
                    times[tile] = _milliseconds(call)
                except triton.runtime.errors.OutOfResources:
                    continue
            best = replace(best, **{kernel: min(times, key=times.__getitem__)})
            TABLE[row] = before = best
    finally:  # an interrupted search leaves what it had found, and no candidate behind
        if before is None:
            del TABLE[row]
        else:
            TABLE[row] = before
    return best


__all__ = ["tune_tiles"]
