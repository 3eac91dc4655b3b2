"""Triton forward kernel: one program per block of query rows and query head, online softmax over tiles of keys."""

import triton
import triton.language as tl

from .launcher import DirectKernel
from .tile import (
    E4M3_MAX,
    PROBABILITY_LOG2,
    RESIDUAL_GAIN,
    add_apart,
    contraction_order,
    dropout_keep,
    heaviest_first,
    key_span,
    row_bounds,
    tile_pointers,
    to_e4m3,
)

LOG2_E = tl.constexpr(1.4426950408889634)

TANH_SERIES = tl.constexpr(0.25)
"""|x| below which tanh(x) comes from its series."""

FACTOR_MIN = tl.constexpr(2.0**-120)
"""All-zero q and k give scales whose product overflows; a factor of 0 would make ∞·0 of a hidden logit."""

HIDDEN = tl.constexpr(-float("inf"))
NOTHING_SEEN = tl.constexpr(-(2.0**100))
"""Row maximum before the first visible key: below any q8·k8 and finite, so that a hidden logit gives p = 0 and not ∞ − ∞."""


@triton.jit
def logit_factor(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale):
    """Base-2 logit of one unit of q8·k8: forward and backward must get the same bits from here."""
    descale = (1 / tl.load(p_q_quant_scale + head)) * (1 / tl.load(p_k_quant_scale + kv_head))
    return tl.maximum(descale * (softmax_scale * LOG2_E), FACTOR_MIN)


@triton.jit
def softmax_factors(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 logit of one unit of what enters the softmax, and what one unit of q8·k8 is as S/cap.

    Without a cap q8·k8 itself enters, and nobody needs the second number; with one, tanh(S/cap) does (`cap_logits`).
    """
    factor = logit_factor(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale)
    cap = softcap * LOG2_E
    return cap if SOFTCAP else factor, factor / cap if SOFTCAP else factor


@triton.jit
def cap_logits(s, cap_unit):
    """tanh(s·cap_unit), within 2⁻¹⁹ of itself; forward and backward must get the same bits from here.

    (1 − e)/(1 + e), e = exp(−2|x|) ∈ [0, 1], cannot overflow. Where 1 − e would cancel, the Taylor series: its first omitted term
    is 3.4e-7 of tanh at TANH_SERIES, where half a unit in the last place of e is 1.5e-7 of 1 − e.
    """
    x = s * cap_unit
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    ratio = (1 - e) / (1 + e)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < TANH_SERIES, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def logit_unit(p_logit_quant_scale, factor, head, LOGITS: tl.constexpr):
    """What one unit of what enters the softmax is as a scaled logit, before its rounding to E4M3."""
    return factor / LOG2_E * tl.load(p_logit_quant_scale + head) if LOGITS else factor


@triton.jit
def round_logits(s, unit):
    """Logits, in the units in which they enter the softmax, as E4M3 keeps them; the same bits in forward and backward."""
    return to_e4m3(s * unit).to(tl.float32) * (1 / unit)


@triton.jit
def attend_tile(
    acc,  # (BM, DP)
    row_sum,  # (BM,)
    row_max,  # (BM,) of q8·k8, or of tanh(S/cap), not yet scaled
    logit_max,  # (BM,) of |q8·k8|, with OBSERVE
    logits_over,  # (BM,) how many logits overflowed, with COUNT
    q,
    d_k,
    d_residual,
    d_v,
    i_key_row,
    i_value_row,
    start_key,
    factor,
    cap_unit,
    unit,
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
    OBSERVE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
    LOWER: tl.constexpr,
):
    k = d_k.load([i_key_row + start_key, 0])
    s = tl.dot(q, k.T)
    if HIGH:
        residual = d_residual.load([i_key_row + start_key, 0])
        s += tl.dot(q, residual.T) * (1 / RESIDUAL_GAIN)
    if MASKED:
        keys = start_key + tl.arange(0, BN)
        visible = keys[None, :] < last[:, None]
        if LOWER:
            visible &= keys[None, :] >= first[:, None]
        s = tl.where(visible, s, HIDDEN)
    if OBSERVE:
        logit_max = tl.maximum(logit_max, tl.max(tl.where(s == HIDDEN, 0.0, tl.abs(s)), 1))
    if SOFTCAP:
        capped = cap_logits(s, cap_unit)
        s = tl.where(s == HIDDEN, HIDDEN, capped) if MASKED else capped
    if COUNT:
        logits_over += tl.sum(tl.where((s == HIDDEN) | (tl.abs(s * unit) <= E4M3_MAX), 0, 1), 1)
    if LOGITS:
        s = tl.where(s == HIDDEN, HIDDEN, round_logits(s, unit))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s * factor - (new_max * factor - PROBABILITY_LOG2)[:, None])
    rescale = tl.exp2((row_max - new_max) * factor)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(seed, threshold, i_head, start_row, start_key, BM, BN, False), p, 0.0)
    p8 = contraction_order(p.to(tl.float8e4nv), BM, BN)  # p ≤ 256
    v = d_v.load([i_value_row, start_key])
    acc = add_apart(acc, rescale[:, None], tl.dot(p8, v.T))
    return acc, row_sum, new_max, logit_max, logits_over


@DirectKernel
@triton.jit
def forward_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_k,  # (B·Hkv·Lk, D)
    d_residual,  # (B·Hkv·Lk, D)
    d_v,  # (B·Hkv·D, Lp)
    p_q_quant_scale,
    p_k_quant_scale,
    p_v_quant_scale,
    p_range,  # (B, Lq, 2) int32
    p_seed,  # (1,) int64
    p_logit_quant_scale,  # (Hq,), with LOGITS
    p_out,  # (B, Hq, Lq, D), strides out_*
    p_shift,  # (B, Hq, Lq): row maximum of the base-2 logits, less 8
    p_row_sum,  # (B, Hq, Lq): Σ P̃
    p_logit_max,  # (Hq,)
    p_overflow,  # (4,) int64, with COUNT
    out_b,
    out_h,
    out_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    window,
    softmax_scale,
    softcap,
    survival,
    threshold,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    HIGH: tl.constexpr,
    DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    OBSERVE: tl.constexpr,
    COUNT: tl.constexpr,
    STAGES: tl.constexpr,
):
    LOWER: tl.constexpr = WINDOW or RANGES
    block, i_head = heaviest_first(tl.cdiv(n_queries, BM))
    start_row = (tl.cdiv(n_queries, BM) - 1 - block) * BM
    batch, head = i_head // n_heads, i_head % n_heads
    kv_head = head // (n_heads // n_kv_heads)
    i_kv = batch * n_kv_heads + kv_head
    i_key_row, i_value_row = i_kv * n_keys, i_kv * D
    factor, cap_unit = softmax_factors(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale, softcap, SOFTCAP)
    unit = logit_unit(p_logit_quant_scale, factor, head, LOGITS)
    seed = tl.load(p_seed) if DROPOUT else 0
    rows = start_row + tl.arange(0, BM)
    first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
    start, full_start, full_stop, stop = key_span(
        rows, first, last, start_row, n_queries, n_keys, window, BN, BM, CAUSAL, WINDOW, RANGES
    )
    q = d_q.load([i_head * n_queries + start_row, 0])
    acc = tl.zeros((BM, DP), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    row_max = tl.full((BM,), NOTHING_SEEN, tl.float32)
    logit_max = tl.zeros((BM,), tl.float32)
    logits_over = tl.zeros((BM,), tl.int32)
    # a loop each for masked and full tiles: a branch inside makes the compiler serialise the matrix products (ptxas C7515)
    if LOWER:
        for start_key in tl.range(start, full_start, BN, num_stages=STAGES):
            acc, row_sum, row_max, logit_max, logits_over = attend_tile(
                acc, row_sum, row_max, logit_max, logits_over, q, d_k, d_residual, d_v, i_key_row, i_value_row, start_key, factor,
                cap_unit, unit, first, last, seed, threshold, i_head, start_row, BM, BN, HIGH, DROPOUT, OBSERVE, SOFTCAP, LOGITS,
                COUNT, True, LOWER,
            )  # fmt: skip
    for start_key in tl.range(full_start, full_stop, BN, num_stages=STAGES):
        acc, row_sum, row_max, logit_max, logits_over = attend_tile(
            acc, row_sum, row_max, logit_max, logits_over, q, d_k, d_residual, d_v, i_key_row, i_value_row, start_key, factor,
            cap_unit, unit, first, last, seed, threshold, i_head, start_row, BM, BN, HIGH, DROPOUT, OBSERVE, SOFTCAP, LOGITS, COUNT,
            False, LOWER,
        )  # fmt: skip
    for start_key in tl.range(full_stop, stop, BN, num_stages=STAGES):
        acc, row_sum, row_max, logit_max, logits_over = attend_tile(
            acc, row_sum, row_max, logit_max, logits_over, q, d_k, d_residual, d_v, i_key_row, i_value_row, start_key, factor,
            cap_unit, unit, first, last, seed, threshold, i_head, start_row, BM, BN, HIGH, DROPOUT, OBSERVE, SOFTCAP, LOGITS, COUNT,
            True, LOWER,
        )  # fmt: skip
    # acc and row_sum both carry the factor 256 of P̃
    seen = row_sum > 0
    acc *= tl.where(seen, 1 / (row_sum * (tl.load(p_v_quant_scale + kv_head) * survival)), 0.0)[:, None]
    valid = rows < n_queries
    p_tile = tile_pointers(p_out, batch, head, start_row, out_b, out_h, out_l, BM, DP)
    tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=valid[:, None] & (tl.arange(0, DP)[None, :] < D))
    i_rows = i_head.to(tl.int64) * n_queries + rows
    tl.store(p_shift + i_rows, tl.where(seen, row_max * factor, 0.0) - PROBABILITY_LOG2, mask=valid)
    tl.store(p_row_sum + i_rows, row_sum * (1 / 256), mask=valid)
    if OBSERVE:
        product_factor = factor * cap_unit if SOFTCAP else factor
        tl.atomic_max(p_logit_max + head, tl.max(tl.where(valid, logit_max, 0.0)) * (product_factor / LOG2_E))
    if COUNT:
        over = tl.sum(tl.where(valid, logits_over, 0))
        if over > 0:
            tl.atomic_add(p_overflow + 3, over.to(tl.int64))
