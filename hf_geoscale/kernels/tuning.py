"""Measure launch shapes for a GPU or head dimension that `tiles.TABLE` has no row for."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from .backend import TRITON_INSTALLED, resolve_backend
from .tiles import DEFAULTS, TABLE, Tile, Tiles, padded_head_dim, tiles_for

if TRITON_INSTALLED:
    import triton

    from . import fused, passes, replay

CANDIDATES = tuple(
    Tile(rows, keys, warps, stages)
    for (rows, keys, warps), stages in product(
        ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 8)), (1, 2, 3)
    )
)


def _milliseconds(call: Callable[[], object]) -> float:
    replay.forget()  # launches of the shape before
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def _calls(
    device: torch.device, dim: int, high: bool, length: int, heads: int, kv_heads: int, dropout_p: float
) -> dict[str, Callable[[], object]]:
    """The op whose time each tile decides, on random causal input."""
    q, grad = torch.randn(2, 1, heads, length, dim, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_heads, length, dim, device=device, dtype=torch.bfloat16)
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    shared: dict[str, Any] = {
        f"{name}_quant_scale": torch.full((count,), 448 / (2 * dim**0.5), device=device)
        for name, count in counts.items()
    }
    shared |= dict.fromkeys(("key_range", "gradient_overflow", "logit_quant_scale", "cos", "sin"))
    shared["dropout_seed"] = torch.zeros((), dtype=torch.int64, device=device) if dropout_p else None
    shared |= {"interleaved": False, "softmax_scale": dim**-0.5, "softcap": 0.0, "causal": True, "window": 0}
    shared |= {"dropout_p": dropout_p, "incoherent": True}

    def forward():
        return fused.attention_forward(q, k, v, **shared, high=high, count=False, observe=False)

    saved = forward()[:8]
    dtypes = dict.fromkeys(("q_dtype", "k_dtype", "v_dtype"), torch.bfloat16)

    def backward():
        return fused.attention_backward(grad, *saved, **shared, packed=False, **dtypes)

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
    dropout_p = 0.1 if passes.hopper.runs(device, padded) and not high else 0.0
    try:
        TABLE[row] = best
        try:
            calls = _calls(device, head_dim, high, length, heads, kv_heads, dropout_p)
        except triton.runtime.errors.OutOfResources:
            TABLE[row] = best = DEFAULTS[padded]
            calls = _calls(device, head_dim, high, length, heads, kv_heads, dropout_p)
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
        replay.forget()
    return best


__all__ = ["tune_tiles"]
