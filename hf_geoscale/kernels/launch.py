"""Launches of the portable attention kernels. `hopper.launch` has the same functions, and `gradients`."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .forward import forward_kernel
from .key_gradient import key_gradient_kernel, query_span_kernel
from .launcher import descriptor
from .query_gradient import query_gradient_kernel
from .reference import GRADIENT_ROWS
from .rotary_tile import rotate_back_kernel
from .tiles import Tiles, cdiv, padded_head_dim, tiles_for

ROTARY_ROWS = 64
"""Rows of one program that turns a gradient back."""


@dataclass(eq=False)
class Call:
    """What the launches of one attention call share. Not to be changed; a frozen one takes five times as long to make."""

    q_quant_scale: Tensor  # (Hq,)
    k_quant_scale: Tensor  # (Hkv,)
    v_quant_scale: Tensor  # (Hkv,)
    key_range: Tensor | None  # (B, Lq, 2) int32, contiguous
    dropout_seed: Tensor | None  # () int64
    softmax_scale: float
    causal: bool
    window: int  # 0: none
    dropout_p: float
    high: bool
    dim: int
    signs: Tensor | None  # of the Hadamard mix, (DP, DP) or less
    mix: int  # width of its blocks, 0: none
    logit_quant_scale: Tensor | None = None  # (Hq,)
    group_rows: int = GRADIENT_ROWS
    softcap: float = 0.0  # 0: none
    cos: Tensor | None = None  # (B or 1, L, R/2): q and k are to be turned by RoPE
    sin: Tensor | None = None  # same shape and strides
    interleaved: bool = False

    @cached_property
    def turned(self) -> int:
        """Channels that RoPE turns."""
        return 0 if self.cos is None else 2 * self.cos.shape[-1]

    @cached_property
    def angle_strides(self) -> tuple[int, int]:
        """Strides of cos and sin along sequences and positions."""
        if self.cos is None:
            return 0, 0
        return self.cos.stride(0) if self.cos.shape[0] > 1 else 0, self.cos.stride(1)

    @property
    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_quant_scale, self.k_quant_scale, self.v_quant_scale

    @cached_property
    def padded_dim(self) -> int:
        return padded_head_dim(self.dim)

    @property
    def tiles(self) -> Tiles:
        return tiles_for(self.q_quant_scale.device, self.dim, self.high)

    @property
    def scalars(self) -> tuple[int, float, float, float, int]:
        """window, softmax_scale, softcap, probability to survive dropout, and the threshold of 32 random bits that does."""
        return self.window, self.softmax_scale, self.softcap, 1 - self.dropout_p, int(self.dropout_p * 2**32)

    @cached_property
    def flags(self) -> dict[str, bool | int]:
        """Compile-time arguments that all three kernels take."""
        return _flags(
            self.causal, self.window > 0, self.key_range is not None, self.high, self.dropout_p > 0, self.softcap > 0,
            self.logit_quant_scale is not None, self.dim,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _flags(
    causal: bool, window: bool, ranges: bool, high: bool, dropout: bool, softcap: bool, logits: bool, dim: int
) -> dict[str, bool | int]:
    return {
        "CAUSAL": causal,
        "WINDOW": window,
        "RANGES": ranges,
        "HIGH": high,
        "DROPOUT": dropout,
        "SOFTCAP": softcap,
        "LOGITS": logits,
        "D": dim,
        "DP": padded_head_dim(dim),
    }


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """View x as (…, last dimension) for tile loads of (rows, columns); what lies outside reads as zero."""
    return descriptor(x, (rows, columns), TensorDescriptor.from_tensor)


def _vectors(x: Tensor, length: int) -> TensorDescriptor:
    return descriptor(x, (length,), TensorDescriptor.from_tensor)


def forward(
    call: Call,
    q8: Tensor,  # (B, Hq, Lq, D)
    k8: Tensor,  # (B, Hkv, Lk, D)
    residual: Tensor,  # (B, Hkv, Lk, D), or empty
    v8: Tensor,  # (B, Hkv, D, Lp)
    out: Tensor,  # (B, Hq, Lq, D)
    shift: Tensor,  # (B, Hq, Lq)
    row_sum: Tensor,  # (B, Hq, Lq)
    logit_max: Tensor,  # (Hq,), or empty
    overflow: Tensor,  # (4,) int64, or empty
) -> None:
    """O into out, the row statistics, and the overflows of quantised logits added to overflow[3]."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    tile, dim = call.tiles.forward, call.padded_dim
    d_k = _tiles(k8, tile.keys, dim)
    forward_kernel[(cdiv(n_queries, tile.rows) * batch * heads,)](
        _tiles(q8, tile.rows, dim), d_k, _tiles(residual, tile.keys, dim) if call.high else d_k, _tiles(v8, dim, tile.keys),
        *call.scales, call.key_range, call.dropout_seed, call.logit_quant_scale, out, shift, row_sum, logit_max, overflow,
        *out.stride()[:3], heads, kv_heads, n_queries, n_keys, *call.scalars, OBSERVE=logit_max.numel() > 0,
        COUNT=call.logit_quant_scale is not None and overflow.numel() > 0, **call.flags, **tile.launch,
    )  # fmt: skip


def stored_tiles(call: Call, q8: Tensor, k8: Tensor) -> None:
    """Nothing: here the kernel of dQ computes dS itself."""


def query_gradient(
    call: Call,
    q8: Tensor,  # (B, Hq, Lq, D)
    k8: Tensor,  # (B, Hkv, Lk, D)
    k8_columns: Tensor,  # (B, Hkv, D, Lp)
    residual: Tensor,  # (B, Hkv, Lk, D), any with call.high False
    residual_columns: Tensor,  # (B, Hkv, D, Lp)
    v8: Tensor,  # (B, Hkv, Lk, D)
    grad8: Tensor,  # (B, Hq, Lq, D)
    shift: Tensor,  # (B, Hq, Lq)
    row_factor: Tensor,  # (B, Hq, Lq)
    row_delta: Tensor,  # (B, Hq, Lq)
    group: Tensor,  # (B, Hq, groups, 4)
    overflow: Tensor | None,  # (1,) int64
    dq: Tensor,  # (B, Hq, Lq, D)
) -> None:
    """dQ into dq, and the overflows of dS8 added to overflow."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    tile, dim = call.tiles.query_gradient, call.padded_dim
    query_gradient_kernel[(cdiv(n_queries, tile.rows) * batch * heads,)](
        _tiles(q8, tile.rows, dim), _tiles(k8, tile.keys, dim), _tiles(k8_columns, dim, tile.keys),
        _tiles(residual, tile.keys, dim), _tiles(residual_columns, dim, tile.keys), _tiles(v8, tile.keys, dim),
        _tiles(grad8, tile.rows, dim), *call.scales, call.key_range, call.dropout_seed, call.logit_quant_scale, shift,
        row_factor, row_delta, group, call.signs, dq, overflow, *dq.stride()[:3], heads, kv_heads, n_queries, n_keys,
        group.shape[2], *call.scalars, GROUP=call.group_rows, MIX=call.mix, COUNT=overflow is not None, **call.flags, **tile.launch,
    )  # fmt: skip
    rotate_back(call, dq)


def key_gradient(
    call: Call,
    q8: Tensor,  # (B, Hq, Lq, D)
    q8_columns: Tensor,  # (B, Hq, D, Lp)
    k8: Tensor,  # (B, Hkv, Lk, D)
    residual: Tensor,  # (B, Hkv, Lk, D), any with call.high False
    v8: Tensor,  # (B, Hkv, Lk, D)
    grad8: Tensor,  # (B, Hq, Lq, D)
    grad8_columns: Tensor,  # (B, Hq, D, Lp)
    group_shift: Tensor,  # (B, Hq, Lp)
    group_delta: Tensor,  # (B, Hq, Lp)
    group: Tensor,  # (B, Hq, groups, 4)
    dk: Tensor,  # (B, Hkv, Lk, D)
    dv: Tensor,  # (B, Hkv, Lk, D)
) -> None:
    """dK and dV into dk and dv."""
    batch, heads, n_queries, _ = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    tile, dim = call.tiles.key_gradient, call.padded_dim
    key_gradient_kernel[(cdiv(n_keys, tile.keys) * batch * kv_heads,)](
        _tiles(q8, tile.rows, dim), _tiles(q8_columns, dim, tile.rows), _tiles(k8, tile.keys, dim),
        _tiles(residual, tile.keys, dim), _tiles(v8, tile.keys, dim), _tiles(grad8, tile.rows, dim),
        _tiles(grad8_columns, dim, tile.rows), _vectors(group_shift, tile.rows), _vectors(group_delta, tile.rows),
        *call.scales[:2], call.key_range, query_spans(call, batch, n_queries, n_keys, tile.keys, tile.rows), call.dropout_seed,
        call.logit_quant_scale, group, call.signs, dk, dv, *dk.stride()[:3], heads, kv_heads, n_queries, n_keys,
        group_shift.shape[2], group.shape[2], *call.scalars, GROUP=call.group_rows, MIX=call.mix, **call.flags, **tile.launch,
    )  # fmt: skip
    rotate_back(call, dk)


def rotate_back(
    call: Call,
    x: Tensor,  # (B, H, L, D)
) -> None:
    """Turn a gradient with respect to what RoPE gave into that with respect to what it took, in place."""
    if not call.turned:
        return
    batch, heads, length, _ = x.shape
    rotate_back_kernel[batch * heads, cdiv(length, ROTARY_ROWS)](
        x, call.cos, call.sin, *x.stride(), *call.angle_strides, heads, length, call.dim, call.padded_dim, call.turned,
        call.interleaved, ROTARY_ROWS,
    )  # fmt: skip


def query_spans(call: Call, batch: int, n_queries: int, n_keys: int, keys: int, rows: int) -> Tensor | None:
    """Which rows see each block of keys, (B, blocks, 4) int32 as `query_span`; None where a kernel computes it itself."""
    if call.key_range is None:
        return None
    n_blocks = cdiv(n_keys, keys)
    span = torch.empty(batch, n_blocks, 4, dtype=torch.int32, device=call.key_range.device)
    query_span_kernel[n_blocks, batch](
        call.key_range, span, n_queries, n_keys, n_blocks, call.window, keys, rows, call.causal, call.window > 0
    )
    return span
