"""Triton kernels that write the FP8 operands q8, k8, v8 from BF16 or FP16 tensors of any strides, each read once.

"Rows" are (B, H, L, D), contiguous along D; "columns" are (B, H, D, Lp), contiguous along the sequence in `contraction_order`, zero
from L to Lp. FP8 matrix units take no transposed operand, so each tensor is stored contiguous along what it is contracted over.
The kernels here also read FP32, but the op rounds it to BF16 first, a part of its specification. The matrix
unit's product with the Hadamard signs is exact for 16-bit operands alone, and the norms round to the operand's type.
"""

import triton
import triton.language as tl

from .launcher import DirectKernel
from .qk_norm_tile import inverse_rms, normalised
from .rotary_tile import load_rotated
from .tile import E4M3_MAX, RESIDUAL_GAIN, contracted_row, mix, paired_row, to_e4m3


@triton.jit
def load_rows(
    p_x, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Some rows of one head of a tensor (B, H, L, D) of any strides: (rows, DP), 0 beyond L and D."""
    dims = tl.arange(0, DP)
    p_tile = p_x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    p_tile += rows[:, None].to(tl.int64) * stride_l + dims[None, :] * stride_d
    return tl.load(p_tile, mask=(rows[:, None] < n_rows) & (dims[None, :] < D), other=0.0)


@triton.jit
def store_rows(p_out, x, i_head, rows, n_rows, D: tl.constexpr, DP: tl.constexpr):
    dims = tl.arange(0, DP)
    p_tile = p_out + (i_head.to(tl.int64) * n_rows + rows[:, None]) * D + dims[None, :]
    tl.store(p_tile, x, mask=(rows[:, None] < n_rows) & (dims[None, :] < D))


@triton.jit
def store_columns(p_out, x, i_head, start, n_padded, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Store a tile (ROWS, DP) whose rows were loaded in `contracted_row` order, transposed."""
    dims, columns = tl.arange(0, DP), start + tl.arange(0, ROWS)
    p_tile = p_out + (i_head.to(tl.int64) * D + dims[None, :]) * n_padded + columns[:, None]
    tl.store(p_tile, x, mask=dims[None, :] < D)


@triton.jit
def quantize_block(
    p_x,
    p_quant_scale,
    p_hadamard,
    p_rows,
    p_columns,
    p_residual,
    p_norm,
    p_amax,
    p_overflow,
    p_cos,
    p_sin,
    p_weight,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    cos_b,
    cos_l,
    norm_eps,
    i_head,
    n_heads,
    n_rows,
    n_padded,
    D: tl.constexpr,
    DP: tl.constexpr,
    TURNED: tl.constexpr,  # channels that RoPE turns; 0: none
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,  # rows get their RMS norm first
    MIX: tl.constexpr,
    COLUMNS: tl.constexpr,  # write columns and the largest row norm; otherwise rows
    RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise BLOCK rows of one head: x·quant_scale, after the norm, RoPE and the Hadamard mix of width MIX if not 0."""
    batch, head = i_head // n_heads, i_head % n_heads
    start = tl.program_id(1) * BLOCK
    rows = contracted_row(start + tl.arange(0, BLOCK))
    if TURNED:
        x = load_rotated(
            p_x, p_cos, p_sin, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, cos_b, cos_l, D, DP, TURNED,
            INTERLEAVED, False, p_weight, norm_eps, NORM,
        )  # fmt: skip
    else:
        x = load_rows(p_x, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D, DP)
        if NORM:
            x = normalised(x, inverse_rms(x, norm_eps, D), p_weight, tl.arange(0, DP), D).to(x.dtype)
    if MIX:
        x = mix(x, p_hadamard, BLOCK, DP, MIX)
    x = x.to(tl.float32) * tl.load(p_quant_scale + head)
    x8 = to_e4m3(x)
    if COLUMNS:
        if start < n_padded:
            store_columns(p_columns, x8, i_head, start, n_padded, BLOCK, D, DP)
            rounded = x8.to(tl.float32)
            tl.atomic_max(p_norm + i_head, tl.sqrt(tl.max(tl.sum(rounded * rounded, 1))))
    else:
        store_rows(p_rows, x8, i_head, rows, n_rows, D, DP)
    if RESIDUAL:
        residual = to_e4m3((x - x8.to(tl.float32)) * RESIDUAL_GAIN)
        store_rows(p_residual, residual, i_head, rows, n_rows, D, DP)
    if COUNT:
        tl.atomic_max(p_amax + head, tl.max(tl.abs(x)))
        over = tl.sum(tl.where(tl.abs(x) <= E4M3_MAX, 0, 1))
        if over > 0:
            tl.atomic_add(p_overflow, over.to(tl.int64))


@DirectKernel
@triton.jit
def quantize_kernel(
    p_q,  # (B, Hq, Lq, D), any strides
    p_k,  # (B, Hkv, Lk, D)
    p_v,  # (B, Hkv, Lk, D)
    p_q_quant_scale,  # (Hq,)
    p_k_quant_scale,  # (Hkv,)
    p_v_quant_scale,  # (Hkv,)
    p_hadamard,  # signs
    p_q8,  # (B, Hq, Lq, D) E4M3
    p_k8,  # (B, Hkv, Lk, D)
    p_residual,  # (B, Hkv, Lk, D): 16 · the rounding error of k8
    p_v8,  # (B, Hkv, D, Lp): columns
    p_v_norm,  # (B, Hkv): largest 2-norm of a row of v8
    p_amax,  # (Hq + 2·Hkv,): largest |x·quant_scale|
    p_overflow,  # (4,) int64: of q, k, v, and room for the logits'
    p_cos,  # (B or 1, L, R/2), with TURNED
    p_sin,
    p_q_norm,  # (D,), with NORM
    p_k_norm,
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    cos_b,
    cos_l,
    norm_eps,
    n_batches,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_padded,
    D: tl.constexpr,
    DP: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    HIGH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All three operands in one launch: program (i, block) takes head i of q, then of k, then of v."""
    i_head = tl.program_id(0)
    n_q, n_kv = n_batches * n_heads, n_batches * n_kv_heads
    if i_head < n_q:
        quantize_block(
            p_q, p_q_quant_scale, p_hadamard, p_q8, None, None, None, p_amax, p_overflow, p_cos, p_sin, p_q_norm, q_b, q_h,
            q_l, q_d, cos_b, cos_l, norm_eps, i_head, n_heads, n_queries, n_queries, D, DP, TURNED, INTERLEAVED, NORM, MIX, False,
            False, COUNT, BLOCK,
        )  # fmt: skip
    elif i_head < n_q + n_kv:
        quantize_block(
            p_k, p_k_quant_scale, p_hadamard, p_k8, None, p_residual, None, p_amax + n_heads, p_overflow + 1, p_cos, p_sin,
            p_k_norm, k_b, k_h, k_l, k_d, cos_b, cos_l, norm_eps, i_head - n_q, n_kv_heads, n_keys, n_keys, D, DP, TURNED,
            INTERLEAVED, NORM, MIX, False, HIGH, COUNT, BLOCK,
        )  # fmt: skip
    else:
        quantize_block(
            p_v, p_v_quant_scale, None, None, p_v8, None, p_v_norm, p_amax + n_heads + n_kv_heads, p_overflow + 2, None, None,
            None, v_b, v_h, v_l, v_d, 0, 0, 0.0, i_head - n_q - n_kv, n_kv_heads, n_keys, n_padded, D, DP, 0, False, False, 0, True,
            False, COUNT, BLOCK,
        )  # fmt: skip


@triton.jit
def to_columns(
    p_rows, p_columns, i_head, n_rows, n_padded, PAIRED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start, dims = tl.program_id(1) * BLOCK, tl.arange(0, DP)
    position = start + tl.arange(0, BLOCK)
    rows = paired_row(position) if PAIRED else contracted_row(position)
    p_tile = p_rows + (i_head.to(tl.int64) * n_rows + rows[:, None]) * D + dims[None, :]
    x = tl.load(p_tile, mask=(rows[:, None] < n_rows) & (dims[None, :] < D), other=0.0)
    if start < n_padded:
        store_columns(p_columns, x, i_head, start, n_padded, BLOCK, D, DP)


@DirectKernel
@triton.jit
def transpose_kernel(
    p_q8,  # (B, Hq, Lq, D)
    p_k8,  # (B, Hkv, Lk, D)
    p_residual,  # (B, Hkv, Lk, D)
    p_v8,  # (B, Hkv, D, Lp)
    p_q8_columns,  # (B, Hq, D, Lp)
    p_k8_columns,  # (B, Hkv, D, Lp)
    p_residual_columns,  # (B, Hkv, D, Lp)
    p_v8_rows,  # (B, Hkv, Lk, D)
    n_batches,
    n_heads,
    n_kv_heads,
    n_queries,
    n_padded_queries,
    n_keys,
    n_padded_keys,
    D: tl.constexpr,
    DP: tl.constexpr,
    HIGH: tl.constexpr,
    PAIRED: tl.constexpr,  # k8_columns in the order of `paired_row`
    BLOCK: tl.constexpr,
):
    """The other layout of each operand, for the backward: program (i, block) takes head i of q, then of k, then of v."""
    i_head = tl.program_id(0)
    n_q, n_kv = n_batches * n_heads, n_batches * n_kv_heads
    if i_head < n_q:
        to_columns(p_q8, p_q8_columns, i_head, n_queries, n_padded_queries, False, D, DP, BLOCK)
    elif i_head < n_q + n_kv:
        to_columns(p_k8, p_k8_columns, i_head - n_q, n_keys, n_padded_keys, PAIRED, D, DP, BLOCK)
        if HIGH:
            to_columns(p_residual, p_residual_columns, i_head - n_q, n_keys, n_padded_keys, False, D, DP, BLOCK)
    else:
        i_head -= n_q + n_kv
        columns, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
        p_tile = p_v8 + (i_head.to(tl.int64) * D + dims[:, None]) * n_padded_keys + columns[None, :]
        x = tl.load(p_tile, mask=(dims[:, None] < D) & (columns[None, :] < n_padded_keys), other=0.0)
        store_rows(p_v8_rows, tl.trans(x), i_head, contracted_row(columns), n_keys, D, DP)
