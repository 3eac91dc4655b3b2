"""dQ on Hopper: one program per block of query rows and query head, 64 rows per warpgroup. Arithmetic of `..query_gradient`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..launcher import DirectKernel
from .shared import (
    HIDDEN,
    ROWS,
    accumulator,
    allocate,
    block_of_rows,
    key_span,
    load_tile,
    logit_factor,
    operand,
    query_gradient_unit,
    ring_barriers,
    row_bounds,
    skip_tiles,
    store_gradient,
    wait_free,
    wait_ready,
)


@gluon.jit
def load_tiles(
    descriptors, tiles, barriers, place, span, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MIX: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries and gradients once, then every tile of keys and values that some warpgroup needs."""
    d_q, d_grad, d_k, d_k_columns, d_v, d_signs = descriptors
    q, grad, k, k_columns, v, signs = tiles
    ready, free, held = barriers
    i_head, i_kv, start_row, n_queries, n_keys = place
    start, stop = span
    mbarrier.expect(held, 2 * CONSUMERS * d_q.block_type.nbytes + (d_signs.block_type.nbytes if MIX else 0))
    for i in gl.static_range(CONSUMERS):
        load_tile(d_q, [i_head * n_queries + start_row + i * ROWS, 0], held, q.index(i))
        load_tile(d_grad, [i_head * n_queries + start_row + i * ROWS, 0], held, grad.index(i))
    if MIX:
        load_tile(d_signs, [0, 0], held, signs.index(0))
    turn = 0
    for start_key in range(start, stop, BN):
        stage = wait_free(free, turn, STAGES)
        here = ready.index(stage)
        mbarrier.expect(here, 3 * d_k.block_type.nbytes)
        load_tile(d_k, [i_kv * n_keys + start_key, 0], here, k.index(stage))
        load_tile(d_v, [i_kv * n_keys + start_key, 0], here, v.index(stage))
        load_tile(d_k_columns, [i_kv * D, start_key], here, k_columns.index(stage))
        turn += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def multiply_tiles(
    context, WHICH: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    MIX: gl.constexpr, TURNED: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, RANGES: gl.constexpr,
    PROMOTION: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dQ of the WHICH-th 64 rows of the block."""
    LOWER: gl.constexpr = WINDOW or RANGES
    S: gl.constexpr = accumulator(BN)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    tiles, barriers, place, span, scalars, pointers, strides = context
    q, grad, k, k_columns, v, signs = tiles
    ready, free, held = barriers
    i_head, i_kv, block_row, n_queries, n_keys = place
    block_start, block_stop = span
    window, softmax_scale, n_groups, n_heads, n_kv_heads = scalars
    (
        p_q_quant_scale, p_k_quant_scale, p_v_quant_scale, p_range, p_shift, p_row_factor, p_row_delta, p_group, p_cos, p_sin, p_dq,
    ) = pointers  # fmt: skip
    start_row = block_row + WHICH * ROWS
    batch, head, kv_head = i_head // n_heads, i_head % n_heads, i_kv % n_kv_heads
    rows = start_row + gl.arange(0, ROWS, ROW)
    valid = rows < n_queries
    first, last = row_bounds(rows, batch, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
    start, full_start, full_stop, stop = key_span(
        rows, first, last, start_row, n_queries, n_keys, window, BN, ROWS, CAUSAL, WINDOW, RANGES
    )
    if start_row >= n_queries:  # rows of the last block beyond the last
        start, stop = block_stop, block_stop
    i_rows = i_head.to(gl.int64) * n_queries + rows
    shift = gl.load(p_shift + i_rows, mask=valid, other=0.0)
    row_factor = gl.load(p_row_factor + i_rows, mask=valid, other=1.0)
    row_delta = gl.load(p_row_delta + i_rows, mask=valid, other=0.0)
    factor = logit_factor(p_q_quant_scale, p_k_quant_scale, head, kv_head, softmax_scale)
    q, grad = q.index(WHICH), grad.index(WHICH)
    dq = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    unused = gl.zeros([ROWS, BN], gl.float32, S)
    unused_sum = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    if PROMOTION > 1:
        tile = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    mbarrier.wait(held, 0)
    turn = skip_tiles(ready, free, gl.to_tensor(0), block_start, min(start, block_stop), BN, STAGES)
    summed = 0
    for start_key in range(start, stop, BN):
        if PROMOTION > 1 and summed == PROMOTION:
            dq += tile
            summed = 0
        stage = wait_ready(ready, turn, STAGES)
        s = warpgroup_mma(q, k.index(stage).permute((1, 0)), unused, use_acc=False, is_async=True)
        dp = warpgroup_mma(grad, v.index(stage).permute((1, 0)), unused, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if (start_key < full_start) | (start_key >= full_stop):
            keys = start_key + gl.arange(0, BN, gl.SliceLayout(0, S))
            s = gl.where(keys[None, :] < last[:, None], s, HIDDEN)
            if LOWER:
                s = gl.where(keys[None, :] >= first[:, None], s, HIDDEN)
        p = gl.exp2(s * factor - shift[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds8 = operand(p * (dp * row_factor[:, None] - row_delta[:, None]), BN)
        k_tile = k_columns.index(stage).permute((1, 0))
        if PROMOTION > 1:
            tile = warpgroup_mma(ds8, k_tile, tile, use_acc=summed > 0, is_async=True)
            tile = warpgroup_mma_wait(0, deps=[tile])
            summed += 1
        else:
            tile = warpgroup_mma(ds8, k_tile, unused_sum, use_acc=False, is_async=True)
            dq += warpgroup_mma_wait(0, deps=[tile])
        mbarrier.arrive(free.index(stage), count=1)
        turn += 1
    skip_tiles(ready, free, turn, max(stop, block_start), block_stop, BN, STAGES)
    if PROMOTION > 1:
        dq += tile
    unit = query_gradient_unit(
        p_k_quant_scale, p_v_quant_scale, p_group, i_head, kv_head, start_row, n_groups, softmax_scale, GROUP
    )
    dq *= gl.convert_layout(unit / row_factor, gl.SliceLayout(1, accumulator(DP)))[:, None]
    signs = signs.index(0) if MIX else None
    store_gradient(p_dq, dq, signs, p_cos, p_sin, batch, head, start_row, n_queries, strides, D, DP, MIX, TURNED)


@DirectKernel
@gluon.jit
def query_gradient_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_k,  # (B·Hkv·Lk, D)
    d_k_columns,  # (B·Hkv·D, Lp)
    d_v,  # (B·Hkv·Lk, D)
    d_grad,  # (B·Hq·Lq, D): dO′8
    d_signs,  # (64, 64) bfloat16, with MIX
    p_q_quant_scale,
    p_k_quant_scale,
    p_v_quant_scale,
    p_range,  # (B, Lq, 2) int32, with RANGES
    p_shift,  # (B, Hq, Lq)
    p_row_factor,
    p_row_delta,
    p_group,  # (B, Hq, groups, 4)
    p_cos,  # (B or 1, Lq, D/2), with TURNED
    p_sin,
    p_dq,  # (B, Hq, Lq, D), strides dq_*
    dq_b,
    dq_h,
    dq_l,
    cos_b,
    cos_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_groups,
    window,
    softmax_scale,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    DP: gl.constexpr,
    BN: gl.constexpr,
    MIX: gl.constexpr,
    TURNED: gl.constexpr,  # turn dQ back through RoPE
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    RANGES: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PROMOTION: gl.constexpr,  # tiles of keys that the matrix unit sums
):
    gl.static_assert(GROUP % ROWS == 0, "the rows of a tile must share a group's scales")
    gl.static_assert(CONSUMERS == 3, "one partition a warpgroup stands below")
    i_head, start_row, start, stop = block_of_rows(
        p_range, n_heads, n_queries, n_keys, window, BN, CONSUMERS, CAUSAL, WINDOW, RANGES
    )
    i_kv = i_head // (n_heads // n_kv_heads)
    descriptors = (d_q, d_grad, d_k, d_k_columns, d_v, d_signs)
    tiles = (
        allocate(d_q, CONSUMERS), allocate(d_grad, CONSUMERS), allocate(d_k, STAGES), allocate(d_k_columns, STAGES),
        allocate(d_v, STAGES), allocate(d_signs, 1) if MIX else None,
    )  # fmt: skip
    barriers = ring_barriers(STAGES, CONSUMERS)
    place, span = (i_head, i_kv, start_row, n_queries, n_keys), (start, stop)
    scalars, strides = (window, softmax_scale, n_groups, n_heads, n_kv_heads), (dq_b, dq_h, dq_l, cos_b, cos_l)
    pointers = (
        p_q_quant_scale, p_k_quant_scale, p_v_quant_scale, p_range, p_shift, p_row_factor, p_row_delta, p_group, p_cos, p_sin, p_dq,
    )  # fmt: skip
    context = (tiles, barriers, place, span, scalars, pointers, strides)
    gl.warp_specialize(
        [
            (multiply_tiles, (context, 0, GROUP, D, DP, BN, STAGES, MIX, TURNED, CAUSAL, WINDOW, RANGES, PROMOTION)),
            (multiply_tiles, (context, 1, GROUP, D, DP, BN, STAGES, MIX, TURNED, CAUSAL, WINDOW, RANGES, PROMOTION)),
            (multiply_tiles, (context, 2, GROUP, D, DP, BN, STAGES, MIX, TURNED, CAUSAL, WINDOW, RANGES, PROMOTION)),
            (load_tiles, (descriptors, tiles, barriers, place, span, D, BN, STAGES, CONSUMERS, MIX)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
