"""Triton kernel for dQ, deterministic: one program per block of query rows and query head.

P̃ is recomputed from the forward's own operands. Separate from dK and dV (seven products in two kernels rather than five in one):
accumulating dQ across key blocks would need atomics or a serial order.
"""

import triton
import triton.language as tl

from .forward import HIDDEN, cap_logits, logit_unit, round_logits, softmax_factors
from .launcher import DirectKernel
from .tile import (
    RESIDUAL_GAIN,
    add_apart,
    contraction_order,
    dropout_keep,
    heaviest_first,
    key_span,
    mix,
    row_bounds,
    tile_pointers,
)


@triton.jit
def query_tile(
    dq,  # (BM, DP)
    dq_residual,  # (BM, DP), with HIGH
    ds_max,  # (BM,) of |dS8|, with COUNT
    q,
    grad,
    d_k,
    d_k_columns,
    d_residual,
    d_residual_columns,
    d_v,
    i_key_row,
    i_column_row,
    start_key,
    factor,
    cap_unit,
    unit,
    shift,
    row_factor,
    row_delta,
    first,
    last,
    seed,
    threshold,
    i_head,
    start_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HIGH: tl.constexpr,
    DROPOUT: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    MASKED: tl.constexpr,
    LOWER: tl.constexpr,
):
    k = d_k.load([i_key_row + start_key, 0])
    v = d_v.load([i_key_row + start_key, 0])
    s = tl.dot(q, k.T)
    if HIGH:
        residual = d_residual.load([i_key_row + start_key, 0])
        s += tl.dot(q, residual.T) * (1 / RESIDUAL_GAIN)
    dp = tl.dot(grad, v.T)
    if SOFTCAP:
        s = cap_logits(s, cap_unit)
        slope = 1 - s * s  # in [0, 1], so the bound of dS holds as it is
    if LOGITS:
        s = round_logits(s, unit)
    if MASKED:
        keys = start_key + tl.arange(0, BN)
        visible = keys[None, :] < last[:, None]
        if LOWER:
            visible &= keys[None, :] >= first[:, None]
        s = tl.where(visible, s, HIDDEN)
    p = tl.exp2(s * factor - shift[:, None])
    if DROPOUT:
        dp = tl.where(dropout_keep(seed, threshold, i_head, start_row, start_key, BM, BN, False), dp, 0.0)
    ds = dp * row_factor[:, None] - row_delta[:, None]
    if SOFTCAP:
        ds *= slope
    ds = p * ds
    if COUNT:
        # NaN counts as Inf: a maximum passes over it
        ds_max = tl.maximum(ds_max, tl.max(tl.where(ds == ds, tl.abs(ds), float("inf")), 1))
    ds8 = contraction_order(ds.to(tl.float8e4nv), BM, BN)  # |ds| ≤ 448 by its bound
    k_columns = d_k_columns.load([i_column_row, start_key])
    dq = add_apart(dq, 1.0, tl.dot(ds8, k_columns.T))
    if HIGH:
        residual_columns = d_residual_columns.load([i_column_row, start_key])
        dq_residual = add_apart(dq_residual, 1.0, tl.dot(ds8, residual_columns.T))
    return dq, dq_residual, ds_max


@DirectKernel
@triton.jit
def query_gradient_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_k,  # (B·Hkv·Lk, D)
    d_k_columns,  # (B·Hkv·D, Lp)
    d_residual,  # (B·Hkv·Lk, D)
    d_residual_columns,  # (B·Hkv·D, Lp)
    d_v,  # (B·Hkv·Lk, D)
    d_grad,  # (B·Hq·Lq, D): dO′8
    p_q_quant_scale,
    p_k_quant_scale,
    p_v_quant_scale,
    p_range,
    p_seed,
    p_logit_quant_scale,
    p_shift,
    p_row_factor,
    p_row_delta,
    p_group,  # (B, Hq, groups, 4)
    p_hadamard,  # signs
    p_dq,  # (B, Hq, Lq, D), strides dq_*
    p_overflow,  # (1,) int64
    dq_b,
    dq_h,
    dq_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_groups,
    window,
    softmax_scale,
    softcap,
    survival,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    HIGH: tl.constexpr,
    DROPOUT: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tl.static_assert(GROUP % BM == 0, "the rows of a tile must share a group's scales")
    LOWER: tl.constexpr = WINDOW or RANGES
    block, i_head = heaviest_first(tl.cdiv(n_queries, BM))
    start_row = (tl.cdiv(n_queries, BM) - 1 - block) * BM
    batch, head = i_head // n_heads, i_head % n_heads
    kv_head = head // (n_heads // n_kv_heads)
    i_kv = batch * n_kv_heads + kv_head
    i_key_row, i_column_row = i_kv * n_keys, i_kv * D
    factor, cap_unit = softmax_factors(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale, softcap, SOFTCAP)
    unit = logit_unit(p_logit_quant_scale, factor, head, LOGITS)
    seed = tl.load(p_seed) if DROPOUT else 0
    rows = start_row + tl.arange(0, BM)
    valid = rows < n_queries
    first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
    start, full_start, full_stop, stop = key_span(
        rows, first, last, start_row, n_queries, n_keys, window, BN, BM, CAUSAL, WINDOW, RANGES
    )
    q = d_q.load([i_head * n_queries + start_row, 0])
    grad = d_grad.load([i_head * n_queries + start_row, 0])
    i_rows = i_head.to(tl.int64) * n_queries + rows
    shift = tl.load(p_shift + i_rows, mask=valid, other=0.0)
    unit_factor = tl.load(p_row_factor + i_rows, mask=valid, other=1.0)
    row_factor = unit_factor / survival if DROPOUT else unit_factor
    row_delta = tl.load(p_row_delta + i_rows, mask=valid, other=0.0)
    dq = tl.zeros((BM, DP), tl.float32)
    dq_residual = tl.zeros((BM, DP), tl.float32)
    ds_max = tl.zeros((BM,), tl.float32)
    if LOWER:
        for start_key in tl.range(start, full_start, BN, num_stages=STAGES):
            dq, dq_residual, ds_max = query_tile(
                dq, dq_residual, ds_max, q, grad, d_k, d_k_columns, d_residual, d_residual_columns, d_v, i_key_row, i_column_row,
                start_key, factor, cap_unit, unit, shift, row_factor, row_delta, first, last, seed, threshold, i_head, start_row,
                BM, BN, HIGH, DROPOUT, COUNT, SOFTCAP, LOGITS, True, LOWER,
            )  # fmt: skip
    for start_key in tl.range(full_start, full_stop, BN, num_stages=STAGES):
        dq, dq_residual, ds_max = query_tile(
            dq, dq_residual, ds_max, q, grad, d_k, d_k_columns, d_residual, d_residual_columns, d_v, i_key_row, i_column_row,
            start_key, factor, cap_unit, unit, shift, row_factor, row_delta, first, last, seed, threshold, i_head,
            start_row, BM, BN, HIGH, DROPOUT, COUNT, SOFTCAP, LOGITS, False, LOWER,
        )  # fmt: skip
    for start_key in tl.range(full_stop, stop, BN, num_stages=STAGES):
        dq, dq_residual, ds_max = query_tile(
            dq, dq_residual, ds_max, q, grad, d_k, d_k_columns, d_residual, d_residual_columns, d_v, i_key_row, i_column_row,
            start_key, factor, cap_unit, unit, shift, row_factor, row_delta, first, last, seed, threshold, i_head,
            start_row, BM, BN, HIGH, DROPOUT, COUNT, SOFTCAP, LOGITS, True, LOWER,
        )  # fmt: skip
    if HIGH:
        dq += dq_residual * (1 / RESIDUAL_GAIN)
    i_group = i_head * n_groups + start_row // GROUP
    dq_unit = softmax_scale / 256 * tl.load(p_group + i_group * 4 + 3)
    dq_unit = dq_unit / tl.load(p_k_quant_scale + kv_head) / tl.load(p_v_quant_scale + kv_head)
    dq *= (dq_unit / unit_factor)[:, None]
    if MIX:
        dq = mix(dq.to(tl.bfloat16), p_hadamard, BM, DP, MIX)
    p_tile = tile_pointers(p_dq, batch, head, start_row, dq_b, dq_h, dq_l, BM, DP)
    tl.store(p_tile, dq.to(p_dq.dtype.element_ty), mask=valid[:, None] & (tl.arange(0, DP)[None, :] < D))
    if COUNT:
        descale = tl.load(p_group + i_group * 4 + 3)  # Inf where the largest gradient of the group is
        ds_max = tl.where(descale < float("inf"), ds_max, float("inf"))
        over = tl.sum(tl.where(valid & ~(ds_max <= 448.0), 1, 0))
        if over > 0:
            tl.atomic_add(p_overflow, over.to(tl.int64))
