"""Forward on Hopper: one program per block of query rows and query head, 64 rows per warpgroup. Arithmetic of `..forward`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..launcher import DirectKernel
from .shared import (
    HIDDEN,
    NOTHING_SEEN,
    PROBABILITY_LOG2,
    ROWS,
    accumulator,
    allocate,
    block_of_rows,
    key_span,
    load_tile,
    logit_factor,
    operand,
    ring_barriers,
    row_bounds,
    row_maximum,
    row_total,
    skip_tiles,
    store_tile,
    wait_free,
    wait_ready,
)


@gluon.jit
def load_tiles(
    descriptors, tiles, barriers, place, span, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """The loading warp: queries once, then every tile of keys and values that some warpgroup needs."""
    d_q, d_k, d_v = descriptors
    q, k, v = tiles
    ready, free, held = barriers
    i_head, i_kv, start_row, n_queries, n_keys = place
    start, stop = span
    mbarrier.expect(held, CONSUMERS * d_q.block_type.nbytes)
    for i in gl.static_range(CONSUMERS):
        load_tile(d_q, [i_head * n_queries + start_row + i * ROWS, 0], held, q.index(i))
    turn = 0
    for start_key in range(start, stop, BN):
        stage = wait_free(free, turn, STAGES)
        here = ready.index(stage)
        mbarrier.expect(here, 2 * d_k.block_type.nbytes)
        load_tile(d_k, [i_kv * n_keys + start_key, 0], here, k.index(stage))
        load_tile(d_v, [i_kv * D, start_key], here, v.index(stage))
        turn += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def multiply_tiles(
    context, WHICH: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: O of the WHICH-th 64 rows of the block, online softmax over tiles of keys."""
    LOWER: gl.constexpr = WINDOW or RANGES
    S: gl.constexpr = accumulator(BN)
    OUT: gl.constexpr = accumulator(DP)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    tiles, barriers, place, span, scalars, pointers, strides = context
    q, k, v = tiles
    ready, free, held = barriers
    i_head, i_kv, block_row, n_queries, n_keys = place
    block_start, block_stop = span
    window, softmax_scale, n_heads, n_kv_heads = scalars
    p_q_quant_scale, p_k_quant_scale, p_v_quant_scale, p_range, p_out, p_shift, p_row_sum = pointers
    start_row = block_row + WHICH * ROWS
    batch, head, kv_head = i_head // n_heads, i_head % n_heads, i_kv % n_kv_heads
    rows = start_row + gl.arange(0, ROWS, ROW)
    first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
    start, full_start, full_stop, stop = key_span(
        rows, first, last, start_row, n_queries, n_keys, window, BN, ROWS, CAUSAL, WINDOW, RANGES
    )
    if start_row >= n_queries:  # rows of the last block beyond the last
        start, stop = block_stop, block_stop
    factor = logit_factor(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale)
    q = q.index(WHICH)
    acc = gl.zeros([ROWS, DP], gl.float32, OUT)
    unused = gl.zeros([ROWS, BN], gl.float32, S)
    unused_out = gl.zeros([ROWS, DP], gl.float32, OUT)
    row_sum = gl.zeros([ROWS], gl.float32, ROW)
    row_max = gl.full([ROWS], NOTHING_SEEN, gl.float32, ROW)
    mbarrier.wait(held, 0)
    turn = skip_tiles(ready, free, gl.to_tensor(0), block_start, min(start, block_stop), BN, STAGES)
    for start_key in range(start, stop, BN):
        stage = wait_ready(ready, turn, STAGES)
        s = warpgroup_mma(q, k.index(stage).permute((1, 0)), unused, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if (start_key < full_start) | (start_key >= full_stop):
            keys = start_key + gl.arange(0, BN, gl.SliceLayout(0, S))
            s = gl.where(keys[None, :] < last[:, None], s, HIDDEN)
            if LOWER:
                s = gl.where(keys[None, :] >= first[:, None], s, HIDDEN)
        new_max = gl.maximum(row_max, gl.convert_layout(row_maximum(s), ROW, assert_trivial=True))
        p = gl.exp2(s * factor - (new_max * factor - PROBABILITY_LOG2)[:, None])
        rescale = gl.exp2((row_max - new_max) * factor)
        row_sum = row_sum * rescale + gl.convert_layout(row_total(p), ROW, assert_trivial=True)
        tile = warpgroup_mma(operand(p, BN), v.index(stage).permute((1, 0)), unused_out, use_acc=False, is_async=True)
        tile = warpgroup_mma_wait(0, deps=[tile])
        acc = acc * gl.convert_layout(rescale, OUT_ROW, assert_trivial=True)[:, None] + tile
        mbarrier.arrive(free.index(stage), count=1)
        row_max = new_max
        turn += 1
    skip_tiles(ready, free, turn, max(stop, block_start), block_stop, BN, STAGES)
    # acc and row_sum both carry the factor 256 of P̃
    seen = row_sum > 0
    descale = gl.where(seen, 1 / (row_sum * gl.load(p_v_quant_scale + kv_head)), 0.0)
    acc *= gl.convert_layout(descale, OUT_ROW, assert_trivial=True)[:, None]
    stride_b, stride_h, stride_l = strides
    store_tile(p_out, acc, batch, head, start_row, n_queries, stride_b, stride_h, stride_l, D, DP)
    i_rows = i_head.to(gl.int64) * n_queries + rows
    valid = rows < n_queries
    gl.store(p_shift + i_rows, gl.where(seen, row_max * factor, 0.0) - PROBABILITY_LOG2, mask=valid)
    gl.store(p_row_sum + i_rows, row_sum * (1 / 256), mask=valid)


@DirectKernel
@gluon.jit
def forward_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_k,  # (B·Hkv·Lk, D)
    d_v,  # (B·Hkv·D, Lp)
    p_q_quant_scale,
    p_k_quant_scale,
    p_v_quant_scale,
    p_range,  # (B, Lq, 2) int32, with RANGES
    p_out,  # (B, Hq, Lq, D), strides out_*
    p_shift,  # (B, Hq, Lq): row maximum of the base-2 logits, less 8
    p_row_sum,  # (B, Hq, Lq): Σ P̃
    out_b,
    out_h,
    out_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    window,
    softmax_scale,
    D: gl.constexpr,
    DP: gl.constexpr,
    BN: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    RANGES: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PROMOTION: gl.constexpr,
):
    gl.static_assert(PROMOTION == 1, "each tile is summed on its own")
    gl.static_assert(CONSUMERS == 3, "one partition a warpgroup stands below")
    i_head, start_row, start, stop = block_of_rows(
        p_range, n_heads, n_queries, n_keys, window, BN, CONSUMERS, CAUSAL, WINDOW, RANGES
    )
    i_kv = i_head // (n_heads // n_kv_heads)
    descriptors = (d_q, d_k, d_v)
    tiles = (allocate(d_q, CONSUMERS), allocate(d_k, STAGES), allocate(d_v, STAGES))
    barriers = ring_barriers(STAGES, CONSUMERS)
    place, span = (i_head, i_kv, start_row, n_queries, n_keys), (start, stop)
    scalars, strides = (window, softmax_scale, n_heads, n_kv_heads), (out_b, out_h, out_l)
    pointers = (p_q_quant_scale, p_k_quant_scale, p_v_quant_scale, p_range, p_out, p_shift, p_row_sum)
    context = (tiles, barriers, place, span, scalars, pointers, strides)
    gl.warp_specialize(
        [
            (multiply_tiles, (context, 0, D, DP, BN, STAGES, CAUSAL, WINDOW, RANGES)),
            (multiply_tiles, (context, 1, D, DP, BN, STAGES, CAUSAL, WINDOW, RANGES)),
            (multiply_tiles, (context, 2, D, DP, BN, STAGES, CAUSAL, WINDOW, RANGES)),
            (load_tiles, (descriptors, tiles, barriers, place, span, D, BN, STAGES, CONSUMERS)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
