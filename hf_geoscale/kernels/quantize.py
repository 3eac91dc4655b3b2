"""Triton kernels that write FP8 operands: from BF16/FP16/FP32 tensors of any strides, each read once.

"Rows" are (B, H, L, D), contiguous along D; "columns" are (B, H, D, Lp), contiguous along the sequence in `contraction_order`, zero
from L to Lp. FP8 matrix units take no transposed operand, so each tensor is stored contiguous along what it is contracted over.
"""

import triton
import triton.language as tl

from . import reference
from .tile import E4M3_MAX, RESIDUAL_GAIN, contracted_row, mix, to_e4m3

GRADIENT_AMAX_MIN = tl.constexpr(reference.GRADIENT_AMAX_MIN)
LOGIT_GRADIENT_MARGIN = tl.constexpr(reference.LOGIT_GRADIENT_MARGIN)
LOGIT_GRADIENT_BOUND_MIN = tl.constexpr(reference.LOGIT_GRADIENT_BOUND_MIN)
ROUNDED_NORM_MARGIN = tl.constexpr(reference.ROUNDED_NORM_MARGIN)

UNIT_MIN = tl.constexpr(2.0**-100)
"""Least unit of a dK or dV accumulator: smaller ones add nothing that matters, and ratios of units must stay finite."""


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
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    i_head,
    n_heads,
    n_rows,
    n_padded,
    D: tl.constexpr,
    DP: tl.constexpr,
    MIX: tl.constexpr,
    COLUMNS: tl.constexpr,  # write columns and the largest row norm; otherwise rows
    RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise BLOCK rows of one head: x·quant_scale, after the Hadamard mix of width MIX if not 0."""
    batch, head = i_head // n_heads, i_head % n_heads
    start = tl.program_id(1) * BLOCK
    rows, dims = contracted_row(start + tl.arange(0, BLOCK)), tl.arange(0, DP)
    inside = (rows[:, None] < n_rows) & (dims[None, :] < D)
    p_tile = p_x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    x = tl.load(p_tile + rows[:, None].to(tl.int64) * stride_l + dims[None, :] * stride_d, mask=inside, other=0.0)
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
            tl.atomic_add(p_overflow, over)


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
    p_overflow,  # (1,) int32
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
    n_batches,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_padded,
    D: tl.constexpr,
    DP: tl.constexpr,
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
            p_q, p_q_quant_scale, p_hadamard, p_q8, None, None, None, p_amax, p_overflow, q_b, q_h, q_l, q_d, i_head, n_heads,
            n_queries, n_queries, D, DP, MIX, False, False, COUNT, BLOCK,
        )  # fmt: skip
    elif i_head < n_q + n_kv:
        quantize_block(
            p_k, p_k_quant_scale, p_hadamard, p_k8, None, p_residual, None, p_amax + n_heads, p_overflow, k_b, k_h, k_l, k_d,
            i_head - n_q, n_kv_heads, n_keys, n_keys, D, DP, MIX, False, HIGH, COUNT, BLOCK,
        )  # fmt: skip
    else:
        quantize_block(
            p_v, p_v_quant_scale, None, None, p_v8, None, p_v_norm, p_amax + n_heads + n_kv_heads, p_overflow, v_b, v_h, v_l,
            v_d, i_head - n_q - n_kv, n_kv_heads, n_keys, n_padded, D, DP, 0, True, False, COUNT, BLOCK,
        )  # fmt: skip


@triton.jit
def to_columns(
    p_rows, p_columns, i_head, n_rows, n_padded, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start = tl.program_id(1) * BLOCK
    rows, dims = contracted_row(start + tl.arange(0, BLOCK)), tl.arange(0, DP)
    p_tile = p_rows + (i_head.to(tl.int64) * n_rows + rows[:, None]) * D + dims[None, :]
    x = tl.load(p_tile, mask=(rows[:, None] < n_rows) & (dims[None, :] < D), other=0.0)
    if start < n_padded:
        store_columns(p_columns, x, i_head, start, n_padded, BLOCK, D, DP)


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
    BLOCK: tl.constexpr,
):
    """The other layout of each operand, for the backward: program (i, block) takes head i of q, then of k, then of v."""
    i_head = tl.program_id(0)
    n_q, n_kv = n_batches * n_heads, n_batches * n_kv_heads
    if i_head < n_q:
        to_columns(p_q8, p_q8_columns, i_head, n_queries, n_padded_queries, D, DP, BLOCK)
    elif i_head < n_q + n_kv:
        to_columns(p_k8, p_k8_columns, i_head - n_q, n_keys, n_padded_keys, D, DP, BLOCK)
        if HIGH:
            to_columns(p_residual, p_residual_columns, i_head - n_q, n_keys, n_padded_keys, D, DP, BLOCK)
    else:
        i_head -= n_q + n_kv
        columns, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
        p_tile = p_v8 + (i_head.to(tl.int64) * D + dims[:, None]) * n_padded_keys + columns[None, :]
        x = tl.load(p_tile, mask=(dims[:, None] < D) & (columns[None, :] < n_padded_keys), other=0.0)
        store_rows(p_v8_rows, tl.trans(x), i_head, contracted_row(columns), n_keys, D, DP)


@triton.jit
def load_folded_gradient(
    p_grad,
    p_row_sum,
    i_head,
    batch,
    head,
    rows,
    n_rows,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """dO′ = dO / Σ P̃ of a block of rows, float32; 0 for rows that saw no key."""
    dims = tl.arange(0, DP)
    inside = (rows[:, None] < n_rows) & (dims[None, :] < D)
    p_tile = p_grad + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    grad = tl.load(p_tile + rows[:, None].to(tl.int64) * stride_l + dims[None, :] * stride_d, mask=inside, other=0.0)
    total = tl.load(p_row_sum + i_head.to(tl.int64) * n_rows + rows, mask=rows < n_rows, other=0.0)
    return grad.to(tl.float32) * tl.where(total > 0, 1 / total, 0.0)[:, None]


@triton.jit
def gradient_range_kernel(
    p_grad,  # (B, Hq, Lq, D), any strides
    p_row_sum,  # (B, Hq, Lq)
    p_range,  # (B, Hq, groups, 2): amax of dO′ and its largest row norm, per group of rows
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    n_heads,
    n_rows,
    n_groups,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_head, start = tl.program_id(0), tl.program_id(1) * BLOCK
    batch, head = i_head // n_heads, i_head % n_heads
    rows = start + tl.arange(0, BLOCK)
    grad = load_folded_gradient(
        p_grad, p_row_sum, i_head, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D, DP
    )
    p_group = p_range + (i_head * n_groups + start // GROUP) * 2
    amax = tl.max(tl.abs(grad))
    norm = tl.sqrt(tl.max(tl.sum(grad * grad, 1)))
    tl.atomic_max(p_group, amax)
    tl.atomic_max(p_group + 1, norm)


@triton.jit
def gradient_quant_scale(amax):
    return E4M3_MAX / tl.maximum(amax, GRADIENT_AMAX_MIN, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def logit_gradient_factor(norm, v_norm, survival):
    """Factor t such that |256·P̃·(dP − δ)·t| ≤ 448 by Cauchy–Schwarz, dP and δ in FP8 units: dP, δ ≤ norm · v_norm."""
    bound = 2 * LOGIT_GRADIENT_MARGIN * norm * v_norm / survival
    return E4M3_MAX / (256 * tl.maximum(bound, LOGIT_GRADIENT_BOUND_MIN, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def quantize_gradient_kernel(
    p_grad,  # (B, Hq, Lq, D), any strides
    p_out,  # (B, Hq, Lq, D), strides out_*
    p_shift,  # (B, Hq, Lq)
    p_row_sum,  # (B, Hq, Lq)
    p_range,  # (B, Hq, groups, 2)
    p_v_norm,  # (B, Hkv)
    p_q_quant_scale,  # (Hq,)
    p_v_quant_scale,  # (Hkv,)
    p_rows,  # (B, Hq, Lq, D) E4M3
    p_columns,  # (B, Hq, D, Lp) E4M3
    p_row_factor,  # (B, Hq, Lq): t of each row, for dQ
    p_row_delta,  # (B, Hq, Lq): δ·t of each row, for dQ
    p_group_delta,  # (B, Hq, Lp): δ·t of the row's group, for dK
    p_group_shift,  # (B, Hq, Lp): p_shift, +∞ where a row saw no key and beyond Lq, so that its P̃ is 0
    p_group,  # (B, Hq, groups, 4): t, real units of dK and of dV accumulators, descale of dO′
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    out_b,
    out_h,
    out_l,
    out_d,
    n_heads,
    n_kv_heads,
    n_rows,
    n_padded,
    n_groups,
    softmax_scale,
    survival,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_head, start = tl.program_id(0), tl.program_id(1) * BLOCK
    batch, head = i_head // n_heads, i_head % n_heads
    kv_head = head // (n_heads // n_kv_heads)
    rows, dims = contracted_row(start + tl.arange(0, BLOCK)), tl.arange(0, DP)
    valid = rows < n_rows
    grad = load_folded_gradient(
        p_grad, p_row_sum, i_head, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D, DP
    )
    i_group = i_head * n_groups + tl.minimum(
        start // GROUP, n_groups - 1
    )  # padding rows past the last group write zeros
    quant_scale = gradient_quant_scale(tl.load(p_range + i_group * 2))
    grad8 = to_e4m3(grad * quant_scale)
    store_rows(p_rows, grad8, i_head, rows, n_rows, D, DP)
    store_columns(p_columns, grad8, i_head, start, n_padded, BLOCK, D, DP)

    p_tile = p_out + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    inside = valid[:, None] & (dims[None, :] < D)
    out = tl.load(p_tile + rows[:, None].to(tl.int64) * out_l + dims[None, :] * out_d, mask=inside, other=0.0)
    v_quant_scale = tl.load(p_v_quant_scale + kv_head)
    v_norm = tl.load(p_v_norm + batch * n_kv_heads + kv_head)
    rounded = grad8.to(tl.float32)
    delta = tl.sum(rounded * out.to(tl.float32), 1) * v_quant_scale
    row_factor = logit_gradient_factor(tl.sqrt(tl.sum(rounded * rounded, 1)), v_norm, survival)
    group_norm = tl.load(p_range + i_group * 2 + 1) * quant_scale * ROUNDED_NORM_MARGIN + (D**0.5) / 1024
    group_factor = logit_gradient_factor(group_norm, v_norm, survival)
    i_rows = i_head.to(tl.int64) * n_rows + rows
    tl.store(p_row_factor + i_rows, row_factor, mask=valid)
    tl.store(p_row_delta + i_rows, delta * row_factor, mask=valid)
    i_padded = i_head.to(tl.int64) * n_padded + rows
    seen = tl.load(p_row_sum + i_rows, mask=valid, other=0.0) > 0
    tl.store(p_group_delta + i_padded, delta * group_factor)
    tl.store(p_group_shift + i_padded, tl.where(seen, tl.load(p_shift + i_rows, mask=valid, other=0.0), float("inf")))
    if start % GROUP == 0 and start < n_rows:
        # one factor at a time: scales of all-zero weights are 2⁶⁰ and more, and their products overflow
        dk_unit = softmax_scale / 256 / group_factor / quant_scale / v_quant_scale / tl.load(p_q_quant_scale + head)
        dv_unit = 1 / (256 * survival) / quant_scale
        tl.store(p_group + i_group * 4, group_factor)
        tl.store(p_group + i_group * 4 + 1, tl.maximum(dk_unit, UNIT_MIN, propagate_nan=tl.PropagateNan.ALL))
        tl.store(p_group + i_group * 4 + 2, tl.maximum(dv_unit, UNIT_MIN, propagate_nan=tl.PropagateNan.ALL))
        tl.store(p_group + i_group * 4 + 3, 1 / quant_scale)
