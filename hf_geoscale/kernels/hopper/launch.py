"""Launches of the Hopper kernels, and their launch shapes."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

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
    promotion: int
    """Positions that the matrix unit sums before float32 does, a multiple of `length` (docs/sums.md). Of dV it is `length`."""

    def __post_init__(self) -> None:
        if self.promotion < self.length or self.promotion % self.length:
            raise ValueError(
                f"promotion must be a multiple of the {self.length} positions of a tile, got {self.promotion}"
            )

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
            "PROMOTION": self.promotion // self.length,
            "num_warps": 4,
            "maxnreg": average,
        }


@dataclass(frozen=True)
class Rings:
    """Launch shapes of the three attention kernels."""

    forward: Ring
    query_gradient: Ring
    key_gradient: Ring


# padded head dimension → rings, for causal and full attention alike. Right: TFLOP/s of O | dQ | dK and dV, counted as in
# `tiles.TABLE`: one H100 80 GB HBM3, 2026-11-22, torch 2.11, Triton 3.6, causal, one sequence of 16,384 tokens, 32/8 heads, in
# sustained runs, where the card slows its clock to stay at 700 W, before float32 summed the tiles.
TABLE = {
    64: Rings(Ring(128, 2, 3, 128), Ring(64, 6, 3, 256), Ring(64, 3, 3, 256)),  # 588 | 837 | 816
    128: Rings(Ring(128, 2, 3, 128), Ring(64, 3, 3, 64), Ring(64, 3, 2, 256)),  # 924 | 1178 | 1000
}

QUERY_PRODUCT = {128: Ring(64, 8, 3, 64)}
"""dQ from dS8 in memory, where that can be. Head dimensions without a shape always compute dS for dQ again: at 64 it is faster."""

STORED_BYTES_PER_ENTRY = 34
"""Most memory for dS8, in bytes per entry of the queries: as 17 tensors like them in BF16. An MLP of Llama's keeps 14."""

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
    return _tiles(call.signs, ROWS, ROWS) if call.signs is not None else None


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
    d_ratio = d_stored = None
    if stored is not None:
        d_ratio, d_stored = _vectors(group_ratio, ring.length), _tiles(stored.view(torch.int16), ROWS, ROWS // 2)
    key_gradient_kernel[(cdiv(n_keys, ring.block) * count,)](
        _tiles(q8, ring.length, dim), _tiles(q8_columns, dim, ring.length), _tiles(k8, ROWS, dim), _tiles(v8, ROWS, dim),
        _tiles(grad8, ring.length, dim), _tiles(grad8_columns, dim, ring.length), _vectors(group_shift, ring.length),
        _vectors(group_delta, ring.length), d_ratio, d_stored, _signs(call), *call.scales[:2], call.key_range,
        query_spans(call, batch, n_queries, n_keys, ROWS, ring.length), group, call.cos, call.sin, dk, dv, *dk.stride()[:3],
        *call.angle_strides, first, heads, kv_heads, n_queries, n_keys, group_shift.shape[2], group.shape[2], call.window,
        call.softmax_scale, GROUP=call.group_rows, BM=ring.length, MIX=call.mix, TURNED=_turns_back(call),
        STORED=stored is not None, **_flags(call), **ring.launch,
    )  # fmt: skip


def heads_stored(call: Call, q8: Tensor, k8: Tensor) -> int:
    """Key/value heads, counted through the batch, whose dS8 the backward stores at a time for dQ; 0: dQ computes its own."""
    batch, heads, length, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    if call.padded_dim not in QUERY_PRODUCT or length != n_keys:
        return 0
    if not call.causal or call.key_range is not None:
        return 0
    most = STORED_BYTES_PER_ENTRY * q8.numel() // _stored_bytes(length, call.window, heads // kv_heads)
    return cdiv(batch * kv_heads, cdiv(batch * kv_heads, most)) if most else 0


def stored_tiles(call: Call, q8: Tensor, k8: Tensor) -> Tensor | None:
    """Memory for the dS8 of `heads_stored` heads, or of fewer where there is less; None where dQ computes its own."""
    _, heads, length, _ = q8.shape
    at_once = heads_stored(call, q8, k8)
    while at_once:
        size = at_once * _stored_bytes(length, call.window, heads // k8.shape[1])
        try:
            return torch.empty(size // ROWS, ROWS, dtype=q8.dtype, device=q8.device)
        except torch.OutOfMemoryError:
            at_once //= 2
    return None


def _stored_bytes(length: int, window: int, heads: int) -> int:
    """Of the tiles that `logit_gradient.tile_number` counts."""
    tiles = cdiv(length, ROWS)
    band = min((window + ROWS - 2) // ROWS + 1, tiles)
    return heads * (tiles * band if window else tiles * (tiles + 1) // 2) * ROWS * ROWS


def gradients(
    call: Call, tiles: Tensor, q8, q8_columns, k8, k8_columns, v8, grad8, grad8_columns, group_shift, group_delta, group_ratio,
    row_factor, group, dq, dk, dv,
) -> None:  # fmt: skip
    """dQ, dK and dV of as many key/value heads at a time as `tiles` (of `stored_tiles`) holds: the kernel of dK and dV stores
    their dS8 there, and that of dQ reads it.
    """
    batch, heads, length, _ = q8.shape
    kv_heads, dim = k8.shape[1], call.padded_dim
    per_kv, ring = heads // kv_heads, QUERY_PRODUCT[dim]
    at_once = tiles.numel() // _stored_bytes(length, call.window, per_kv)
    for first in range(0, batch * kv_heads, at_once):
        count = min(at_once, batch * kv_heads - first)
        _key_gradient(
            call, q8, q8_columns, k8, v8, grad8, grad8_columns, group_shift, group_delta, group, dk, dv, group_ratio, tiles, first,
            count,
        )  # fmt: skip
        query_product_kernel[(cdiv(length, ring.block) * count * per_kv,)](
            _tiles(tiles, ROWS, ROWS), _tiles(k8_columns, dim, ROWS), _signs(call), *call.scales[1:], row_factor, group, call.cos,
            call.sin, dq, *dq.stride()[:3], *call.angle_strides, first * per_kv, heads, kv_heads, length, group.shape[2],
            call.window, call.softmax_scale, GROUP=call.group_rows, D=call.dim, DP=dim, MIX=call.mix, TURNED=_turns_back(call),
            WINDOW=call.window > 0, **ring.launch,
        )  # fmt: skip
    if not _turns_back(call):
        rotate_back(call, dq)
        rotate_back(call, dk)
