"""Triton kernel for dK and dV, deterministic: one program per block of keys and key/value head, over all its query heads.

P̃ is recomputed from the forward's own operands. Both products that read registers (dV, dK) are issued together at the end of a
tile: a register operand written while another product is in flight makes the compiler serialise every matrix instruction
(ptxas C7513).
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
    mix,
    row_bounds,
    tile_pointers,
)


@triton.jit
def query_span(
    start_key,
    n_queries,
    n_keys,
    window,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Rows [start, stop) that may see a block of keys, and [full_start, full_stop), whose tiles need no mask."""
    offset = n_keys - n_queries
    stop_key = tl.minimum(start_key + KEYS, n_keys)
    seen_from, all_from, seen_to = 0, 0, n_queries
    all_to = tl.cdiv(n_queries, ROWS) * ROWS  # rows beyond the last have P̃ = 0 without a mask
    if CAUSAL:
        seen_from = tl.minimum(tl.maximum(start_key - offset, 0), n_queries)
        all_from = tl.maximum(stop_key - 1 - offset, 0)
    if WINDOW:
        seen_to = tl.minimum(tl.maximum(stop_key - 1 + window - offset, 0), n_queries)
        all_to = tl.minimum(tl.maximum(start_key + window - offset, 0), n_queries)
    start = seen_from // ROWS * ROWS
    stop = tl.maximum(seen_to, start)
    tiles_stop = tl.cdiv(stop, ROWS) * ROWS
    full_start = tl.maximum(tl.minimum(tl.cdiv(all_from, ROWS) * ROWS, tiles_stop), start)
    full_stop = tl.minimum(tl.maximum(all_to // ROWS * ROWS, full_start), tiles_stop)
    return start, full_start, full_stop, stop


@DirectKernel
@triton.jit
def query_span_kernel(
    p_range,  # (B, Lq, 2)
    p_span,  # (B, key blocks, 4)
    n_queries,
    n_keys,
    n_blocks,
    window,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """`query_span` for arbitrary ranges of keys per row; unmasked is the first run of fully visible tiles."""
    block, batch = tl.program_id(0), tl.program_id(1)
    start_key = block * KEYS
    stop_key = tl.minimum(start_key + KEYS, n_keys)
    beyond = tl.cdiv(n_queries, ROWS) * ROWS
    start, full_start, full_stop, stop = beyond, beyond, beyond, 0
    for start_row in range(0, n_queries, ROWS):
        rows = start_row + tl.arange(0, ROWS)
        first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, True)
        some = tl.max(((first < stop_key) & (last > start_key) & (first < last)).to(tl.int32)) == 1
        every = tl.min(((first <= start_key) & (last >= stop_key)).to(tl.int32)) == 1
        start = tl.where(some & (start == beyond), start_row, start)
        stop = tl.where(some, start_row + ROWS, stop)
        full_start = tl.where(every & (full_start == beyond), start_row, full_start)
        full_stop = tl.where((~every) & (full_start < beyond) & (full_stop == beyond), start_row, full_stop)
    stop = tl.maximum(stop, start)  # all four are multiples of ROWS
    full_start = tl.minimum(full_start, stop)
    full_stop = tl.minimum(full_stop, stop)
    p_block = p_span + (batch * n_blocks + block) * 4
    tl.store(p_block, start)
    tl.store(p_block + 1, full_start)
    tl.store(p_block + 2, full_stop)
    tl.store(p_block + 3, stop)


@triton.jit
def key_tile(
    dk,  # (BN, DP)
    dv,  # (BN, DP)
    k,
    residual,
    v,
    d_q,
    d_q_columns,
    d_grad,
    d_grad_columns,
    d_shift,
    d_delta,
    p_range,
    i_query_row,
    i_padded_row,
    i_column_row,
    start_row,
    start_key,
    factor,
    cap_unit,
    unit,
    group_factor,
    batch,
    n_queries,
    n_keys,
    window,
    seed,
    threshold,
    i_head,
    masked,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    HIGH: tl.constexpr,
    DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
):
    q = d_q.load([i_query_row + start_row, 0])
    grad = d_grad.load([i_query_row + start_row, 0])
    s = tl.dot(k, q.T)  # transposed: (BN, BM)
    if HIGH:
        s += tl.dot(residual, q.T) * (1 / RESIDUAL_GAIN)
    dp = tl.dot(v, grad.T)
    if SOFTCAP:
        s = cap_logits(s, cap_unit)
        slope = 1 - s * s  # in [0, 1], so the bound of dS holds as it is
    if LOGITS:
        s = round_logits(s, unit)
    if masked:
        rows, keys = start_row + tl.arange(0, BM), start_key + tl.arange(0, BN)
        if WINDOW or RANGES:
            first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
            visible = (keys[:, None] >= first[None, :]) & (keys[:, None] < last[None, :])
        else:  # causal; rows beyond the last have P̃ = 0 by their shift
            visible = keys[:, None] <= (rows + (n_keys - n_queries))[None, :]
        s = tl.where(visible, s, HIDDEN)
    shift = d_shift.load([i_padded_row + start_row])
    delta = d_delta.load([i_padded_row + start_row])
    p = tl.exp2(s * factor - shift[None, :])
    if DROPOUT:
        keep = dropout_keep(seed, threshold, i_head, start_row, start_key, BM, BN, True)
        ds = tl.where(keep, dp, 0.0) * group_factor - delta[None, :]
    else:
        ds = dp * group_factor - delta[None, :]
    if SOFTCAP:
        ds *= slope
    ds = p * ds
    if DROPOUT:
        p = tl.where(keep, p, 0.0)
    p8 = contraction_order(p.to(tl.float8e4nv), BN, BM)
    ds8 = contraction_order(ds.to(tl.float8e4nv), BN, BM)
    grad_columns = d_grad_columns.load([i_column_row, start_row])
    q_columns = d_q_columns.load([i_column_row, start_row])
    dv_tile, dk_tile = tl.dot(p8, grad_columns.T), tl.dot(ds8, q_columns.T)
    dv = add_apart(dv, 1.0, dv_tile)
    dk = add_apart(dk, 1.0, dk_tile)
    return dk, dv


@DirectKernel
@triton.jit
def key_gradient_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_q_columns,  # (B·Hq·D, Lp)
    d_k,  # (B·Hkv·Lk, D)
    d_residual,  # (B·Hkv·Lk, D)
    d_v,  # (B·Hkv·Lk, D)
    d_grad,  # (B·Hq·Lq, D): dO′8
    d_grad_columns,  # (B·Hq·D, Lp)
    d_shift,  # (B·Hq·Lp,)
    d_delta,  # (B·Hq·Lp,)
    p_q_quant_scale,
    p_k_quant_scale,
    p_range,
    p_span,  # (B, key blocks, 4), with RANGES
    p_seed,
    p_logit_quant_scale,  # (Hq,), with LOGITS
    p_group,  # (B, Hq, groups, 4)
    p_hadamard,  # signs
    p_dk,  # (B, Hkv, Lk, D), strides dk_*
    p_dv,  # same strides
    dk_b,
    dk_h,
    dk_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_padded,
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
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tl.static_assert(GROUP % BM == 0, "the rows of a tile must share a group's scales")
    block, i_kv = heaviest_first(tl.cdiv(n_keys, BN))
    start_key = block * BN
    batch, kv_head = i_kv // n_kv_heads, i_kv % n_kv_heads
    seed = tl.load(p_seed) if DROPOUT else 0
    if RANGES:
        p_block = p_span + (batch * tl.cdiv(n_keys, BN) + block) * 4
        start, full_start = tl.load(p_block), tl.load(p_block + 1)
        full_stop, stop = tl.load(p_block + 2), tl.load(p_block + 3)
    else:
        start, full_start, full_stop, stop = query_span(start_key, n_queries, n_keys, window, BN, BM, CAUSAL, WINDOW)
    k = d_k.load([i_kv * n_keys + start_key, 0])
    v = d_v.load([i_kv * n_keys + start_key, 0])
    residual = d_residual.load([i_kv * n_keys + start_key, 0]) if HIGH else k
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DP), tl.float32)
    dk_unit, dv_unit = 1.0, 1.0
    heads = n_heads // n_kv_heads
    for head in range(kv_head * heads, (kv_head + 1) * heads):
        i_head = batch * n_heads + head
        factor, cap_unit = softmax_factors(
            p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale, softcap, SOFTCAP
        )
        unit = logit_unit(p_logit_quant_scale, factor, head, LOGITS)
        i_query_row, i_padded_row, i_column_row = i_head * n_queries, i_head * n_padded, i_head * D
        for group in range(start // GROUP, tl.cdiv(stop, GROUP)):
            # rows of one group share the scales of dO′8 and dS8: the accumulators change units in between
            p_scales = p_group + (i_head * n_groups + group) * 4
            group_factor = tl.load(p_scales)
            if DROPOUT:
                group_factor = group_factor / survival
            new_dk_unit, new_dv_unit = tl.load(p_scales + 1), tl.load(p_scales + 2)
            dk *= dk_unit / new_dk_unit
            dv *= dv_unit / new_dv_unit
            dk_unit, dv_unit = new_dk_unit, new_dv_unit
            low, high = group * GROUP, (group + 1) * GROUP
            for start_row in tl.range(tl.maximum(start, low), tl.minimum(stop, high), BM, num_stages=STAGES):
                masked = (start_row < full_start) | (start_row >= full_stop)
                dk, dv = key_tile(
                    dk, dv, k, residual, v, d_q, d_q_columns, d_grad, d_grad_columns, d_shift, d_delta, p_range, i_query_row,
                    i_padded_row, i_column_row, start_row, start_key, factor, cap_unit, unit, group_factor, batch, n_queries,
                    n_keys, window, seed, threshold, i_head, masked, BM, BN, CAUSAL, WINDOW, RANGES, HIGH, DROPOUT, SOFTCAP, LOGITS,
                )  # fmt: skip
    dk *= dk_unit
    dv *= dv_unit
    if MIX:
        dk = mix(dk.to(tl.bfloat16), p_hadamard, BN, DP, MIX)
    inside = (start_key + tl.arange(0, BN)[:, None] < n_keys) & (tl.arange(0, DP)[None, :] < D)
    p_tile = tile_pointers(p_dk, batch, kv_head, start_key, dk_b, dk_h, dk_l, BN, DP)
    tl.store(p_tile, dk.to(p_dk.dtype.element_ty), mask=inside)
    p_tile = tile_pointers(p_dv, batch, kv_head, start_key, dk_b, dk_h, dk_l, BN, DP)
    tl.store(p_tile, dv.to(p_dv.dtype.element_ty), mask=inside)
