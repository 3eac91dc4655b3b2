"""Triton kernels that write dO′8, δ and the scales of dS: dO is read twice, for its range and to be quantised."""

import triton
import triton.language as tl

from . import reference
from .launcher import DirectKernel
from .quantize import load_rows, store_columns, store_rows
from .tile import E4M3_MAX, contracted_row, to_e4m3

GRADIENT_AMAX_MIN = tl.constexpr(reference.GRADIENT_AMAX_MIN)
LOGIT_GRADIENT_MARGIN = tl.constexpr(reference.LOGIT_GRADIENT_MARGIN)
LOGIT_GRADIENT_BOUND_MIN = tl.constexpr(reference.LOGIT_GRADIENT_BOUND_MIN)
ROUNDED_NORM_MARGIN = tl.constexpr(reference.ROUNDED_NORM_MARGIN)

UNIT_MIN = tl.constexpr(2.0**-100)
"""Least unit of a dK or dV accumulator: smaller ones add nothing that matters, and ratios of units must stay finite."""


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
    grad = load_rows(p_grad, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D, DP)
    total = tl.load(p_row_sum + i_head.to(tl.int64) * n_rows + rows, mask=rows < n_rows, other=0.0)
    return grad.to(tl.float32) * tl.where(total > 0, 1 / total, 0.0)[:, None]


@DirectKernel
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


@DirectKernel
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
    p_ratio,  # (B, Hq, Lp): t of each row over that of its group, with RATIO
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
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_head, start = tl.program_id(0), tl.program_id(1) * BLOCK
    batch, head = i_head // n_heads, i_head % n_heads
    kv_head = head // (n_heads // n_kv_heads)
    rows = contracted_row(start + tl.arange(0, BLOCK))
    valid = rows < n_rows
    grad = load_folded_gradient(
        p_grad, p_row_sum, i_head, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, D, DP
    )
    group = tl.minimum(start // GROUP, n_groups - 1)  # padding rows may lie past the last group; they write zeros
    i_group = i_head * n_groups + group
    quant_scale = gradient_quant_scale(tl.load(p_range + i_group * 2))
    grad8 = to_e4m3(grad * quant_scale)
    store_rows(p_rows, grad8, i_head, rows, n_rows, D, DP)
    store_columns(p_columns, grad8, i_head, start, n_padded, BLOCK, D, DP)

    out = load_rows(p_out, batch, head, rows, n_rows, out_b, out_h, out_l, out_d, D, DP)
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
    if RATIO:
        tl.store(p_ratio + i_padded, row_factor / group_factor)
    if start % GROUP == 0 and start < n_rows:
        # one factor at a time: scales of all-zero weights are 2⁶⁰ and more, and their products overflow
        dk_unit = softmax_scale / 256 / group_factor / quant_scale / v_quant_scale / tl.load(p_q_quant_scale + head)
        dv_unit = 1 / (256 * survival) / quant_scale
        tl.store(p_group + i_group * 4, group_factor)
        tl.store(p_group + i_group * 4 + 1, tl.maximum(dk_unit, UNIT_MIN, propagate_nan=tl.PropagateNan.ALL))
        tl.store(p_group + i_group * 4 + 2, tl.maximum(dv_unit, UNIT_MIN, propagate_nan=tl.PropagateNan.ALL))
        tl.store(p_group + i_group * 4 + 3, 1 / quant_scale)
