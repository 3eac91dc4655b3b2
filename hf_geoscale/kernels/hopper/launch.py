"""Launches of the Hopper kernels, and their launch shapes."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import lanes
from ..launch import Call, query_spans, rotate_back
from ..launcher import descriptor
from ..tiles import cdiv
from .forward import forward_kernel
from .key_gradient import key_gradient_kernel
from .logit_gradient import query_product_kernel
from .query_gradient import query_gradient_kernel

ROWS = 64
"""Rows of one multiplying warpgroup (`shared.ROWS`)."""


@dataclass(frozen=True)
class Ring:
    """One launch shape: length of a tile along the loop, tiles in flight, multiplying warpgroups that share them."""

    length: int
    stages: int
    consumers: int

    @property
    def block(self) -> int:
        """Rows or keys of one program."""
        return ROWS * self.consumers

    @cached_property
    def launch(self) -> dict[str, int]:
        """As keyword arguments: the registers are 64 Ki over the program's threads, most of them to the multiplying warpgroups."""
        registers, average = {2: (240, 168), 3: (160, 128)}[self.consumers]
        return {
            "STAGES": self.stages,
            "CONSUMERS": self.consumers,
            "REGISTERS": registers,
            "num_warps": 4,
            "maxnreg": average,
        }


@dataclass(frozen=True)
class Rings:
    """Launch shapes of the three attention kernels."""

    forward: Ring
    query_gradient: Ring
    key_gradient: Ring
    query_product: Ring | None  # dQ from dS8 in memory; None: dQ computes its own, which is faster


# padded head dimension → rings, for causal and full attention alike. Right: TFLOP/s of O | dQ | dK and dV, counted as in
# `tiles.TABLE`: one H100 80 GB HBM3, 2026-11-22, torch 2.11, Triton 3.6, causal, one sequence of 16,384 tokens, 32/8 heads, in
# sustained runs, where the card slows its clock to stay at 700 W.
TABLE = {
    64: Rings(Ring(128, 2, 3), Ring(64, 6, 3), Ring(64, 3, 3), None),  # 588 | 837 | 816
    128: Rings(Ring(128, 2, 3), Ring(64, 3, 3), Ring(64, 3, 2), Ring(64, 8, 3)),  # 924 | 1178 | 1000
}

STORED_LENGTH_MIN = 2048
"""Shortest sequences whose dS8 is stored."""

STORED_BYTES_PER_ENTRY = 32
"""Most memory for dS8, in bytes per entry of the queries: as much as 16 tensors like them in BF16. An MLP of Llama's keeps 14."""

PROGRAMS = 132
"""As many programs of the kernel of dK and dV as run at once."""

VECTOR = gl.NVMMASharedLayout(0, 32, 1)


@lru_cache
def _layout(rows: int, columns: int, width: int) -> gl.NVMMASharedLayout:
    """Layout of a tile of elements of `width` bytes; cached, since making one takes 20 µs."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], {1: gl.float8e4nv, 2: gl.bfloat16}[width])


def _describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = VECTOR if len(block) == 1 else _layout(*block, x.element_size())
    return TensorDescriptor.from_tensor(x, block, layout)


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """View x as (…, last dimension) for tile loads of (rows, columns); what lies outside reads as zero."""
    return descriptor(x, (rows, columns), _describe)


def _vectors(x: Tensor, length: int) -> TensorDescriptor:
    return descriptor(x, (length,), _describe)


def _signs(call: Call) -> TensorDescriptor | None:
    return _tiles(call.signs, call.padded_dim, call.padded_dim) if call.signs is not None else None


def _flags(call: Call) -> dict[str, bool | int]:
    return _fewer_flags(call.causal, call.window > 0, call.key_range is not None, call.dim, call.padded_dim)


@lru_cache(maxsize=64)
def _fewer_flags(causal: bool, window: bool, ranges: bool, dim: int, padded_dim: int) -> dict[str, bool | int]:
    """Those of `Call.flags` that these kernels have."""
    return {"CAUSAL": causal, "WINDOW": window, "RANGES": ranges, "D": dim, "DP": padded_dim}


def _turns_back(call: Call) -> bool:
    """Whether the kernels turn their gradients back through RoPE themselves: whole heads, in halves, without padding."""
    return call.turned == call.dim == call.padded_dim and not call.interleaved


def forward(call: Call, q8, k8, residual, v8, out, shift, row_sum, logit_max, overflow) -> None:
    """As the portable launch; `residual`, `logit_max` and `overflow` are not used."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    dim = call.padded_dim
    ring = TABLE[dim].forward
    forward_kernel[(cdiv(n_queries, ring.block) * batch * heads,)](
        _tiles(q8, ROWS, dim), _tiles(k8, ring.length, dim), _tiles(v8, dim, ring.length), *call.scales, call.key_range, out, shift,
        row_sum, *out.stride()[:3], heads, kv_heads, n_queries, n_keys, call.window, call.softmax_scale, BN=ring.length,
        **_flags(call), **ring.launch,
    )  # fmt: skip


def query_gradient(
    call: Call, q8, k8, k8_columns, residual, residual_columns, v8, grad8, shift, row_factor, row_delta, group, overflow, dq
) -> None:  # fmt: skip
    """As the portable launch; the residuals and `overflow` are not used."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    dim = call.padded_dim
    ring = TABLE[dim].query_gradient
    query_gradient_kernel[(cdiv(n_queries, ring.block) * batch * heads,)](
        _tiles(q8, ROWS, dim), _tiles(k8, ring.length, dim), _tiles(k8_columns, dim, ring.length), _tiles(v8, ring.length, dim),
        _tiles(grad8, ROWS, dim), _signs(call), *call.scales, call.key_range, shift,
        row_factor, row_delta, group, call.cos, call.sin, dq, *dq.stride()[:3], *call.angle_strides, heads, kv_heads, n_queries,
        n_keys, group.shape[2], call.window, call.softmax_scale, GROUP=call.group_rows, BN=ring.length, MIX=call.mix,
        TURNED=_turns_back(call), **_flags(call), **ring.launch,
    )  # fmt: skip
    if not _turns_back(call):
        rotate_back(call, dq)


def key_gradient(
    call: Call, q8, q8_columns, k8, residual, v8, grad8, grad8_columns, group_shift, group_delta, group, dk, dv
) -> None:
    """As the portable launch; `residual` is not used."""
    _key_gradient(call, q8, q8_columns, k8, v8, grad8, grad8_columns, group_shift, group_delta, group, dk, dv)
    if not _turns_back(call):
        rotate_back(call, dk)


def _key_gradient(
    call: Call, q8, q8_columns, k8, v8, grad8, grad8_columns, group_shift, group_delta, group, dk, dv, group_ratio=None,
    stored=None, first=0, count=None,
) -> None:  # fmt: skip
    """dK and dV of `count` key/value heads, counted through the batch, from `first` on; their dS8 into `stored`."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    count = batch * kv_heads if count is None else count
    dim = call.padded_dim
    ring = TABLE[dim].key_gradient
    key_gradient_kernel[(cdiv(n_keys, ring.block) * count,)](
        _tiles(q8, ring.length, dim), _tiles(q8_columns, dim, ring.length), _tiles(k8, ROWS, dim), _tiles(v8, ROWS, dim),
        _tiles(grad8, ring.length, dim), _tiles(grad8_columns, dim, ring.length), _vectors(group_shift, ring.length),
        _vectors(group_delta, ring.length), _vectors(group_ratio, ring.length) if group_ratio is not None else None,
        _tiles(stored.view(torch.int16), ROWS, ROWS // 2) if stored is not None else None, _signs(call), *call.scales[:2], call.key_range,
        query_spans(call, batch, n_queries, n_keys, ROWS, ring.length), group, call.cos, call.sin, dk, dv, *dk.stride()[:3],
        *call.angle_strides, first, heads, kv_heads, n_queries, n_keys, group_shift.shape[2], group.shape[2], call.window,
        call.softmax_scale, GROUP=call.group_rows, BM=ring.length, MIX=call.mix, TURNED=_turns_back(call), STORED=stored is not None,
        **_flags(call), **ring.launch,
    )  # fmt: skip


class Stored(NamedTuple):
    """How dS8 is stored: of how many key/value heads at a time, counted through the batch, on how many streams (`..lanes`)."""

    heads: int
    lanes: int


def stored(call: Call, q8: Tensor, k8: Tensor) -> Stored | None:
    """How the backward stores dS8 for dQ; None where dQ computes its own."""
    batch, heads, length, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    rings = TABLE[call.padded_dim]
    if rings.query_product is None or not call.causal or call.window or call.key_range is not None or length != n_keys:
        return None
    if length < STORED_LENGTH_MIN:
        return None
    most = STORED_BYTES_PER_ENTRY * q8.numel() // _stored_bytes(length, heads // kv_heads)  # heads in memory
    at_once = max(round(PROGRAMS / cdiv(length, rings.key_gradient.block)), 1)
    if batch * kv_heads <= min(at_once, most):
        return Stored(batch * kv_heads, 1)
    at_once = min(at_once, max(most // lanes.COUNT, 1))
    return Stored(at_once, min(most // at_once, lanes.COUNT)) if most else None


def _stored_bytes(length: int, heads: int) -> int:
    tiles = cdiv(length, ROWS)
    return heads * tiles * (tiles + 1) // 2 * ROWS * ROWS


def gradients(
    call: Call, how: Stored, q8, q8_columns, k8, k8_columns, v8, grad8, grad8_columns, group_shift, group_delta, group_ratio,
    row_factor, group, dq, dk, dv,
) -> None:  # fmt: skip
    """dQ, dK and dV, a few key/value heads at a time: their dS8 is stored by the kernel of dK and dV, and read by that of dQ."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, dim = k8.shape[1], call.padded_dim
    per_kv, ring = heads // kv_heads, TABLE[dim].query_product
    rows = _stored_bytes(n_queries, how.heads * per_kv) // ROWS
    memory = torch.empty(how.lanes, rows, ROWS, dtype=q8.dtype, device=q8.device).unbind()

    def run(first: int, tiles: Tensor) -> None:
        count = min(how.heads, batch * kv_heads - first)
        _key_gradient(
            call, q8, q8_columns, k8, v8, grad8, grad8_columns, group_shift, group_delta, group, dk, dv, group_ratio, tiles, first,
            count,
        )  # fmt: skip
        query_product_kernel[(cdiv(n_queries, ring.block) * count * per_kv,)](
            _tiles(tiles, ROWS, ROWS), _tiles(k8_columns, dim, ROWS), _signs(call), *call.scales[1:], row_factor, group, call.cos,
            call.sin, dq, *dq.stride()[:3], *call.angle_strides, first * per_kv, heads, kv_heads, n_queries, group.shape[2],
            call.softmax_scale, GROUP=call.group_rows, D=call.dim, DP=dim, MIX=call.mix, TURNED=_turns_back(call), **ring.launch,
        )  # fmt: skip

    if how.lanes == 1:
        for first in range(0, batch * kv_heads, how.heads):
            run(first, memory[0])
    else:
        with lanes.open_lanes(q8.device) as on_lane:
            for i, first in enumerate(range(0, batch * kv_heads, how.heads)):
                with on_lane(i % how.lanes):
                    run(first, memory[i % how.lanes])
    if not _turns_back(call):
        rotate_back(call, dq)
        rotate_back(call, dk)
