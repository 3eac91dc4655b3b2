"""dK and dV on Hopper: one program per block of keys and key/value head, 64 keys per warpgroup. Arithmetic of `..key_gradient`.

For dV the matrix unit sums one tile, and registers sum the tiles in float32. For dK it sums a few tiles, and shared memory holds
the float32 sum (`promotion`): two sums and a tile of each would not fit into the registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launcher import DirectKernel
from .logit_gradient import BUFFERS, round_pairs, store_pairs, tile_number, wait_stored
from .promotion import load_sum, promote, quads
from .shared import (
    HIDDEN,
    ROWS,
    accumulator,
    allocate,
    heaviest_first,
    load_tile,
    logit_factor,
    operand,
    query_span,
    reinterpret,
    ring_barriers,
    skip_tiles,
    store_gradient,
    store_tile,
    wait_free,
    wait_ready,
)


@gluon.jit
def block_span(
    p_span,
    batch,
    start_key,
    n_queries,
    n_keys,
    window,
    KEYS: gl.constexpr,
    BM: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    RANGES: gl.constexpr,
):
    """Rows (start, full_start, full_stop, stop) of a block of KEYS keys, as `query_span`; p_span has them per 64 keys."""
    if RANGES:
        n_blocks = gl.cdiv(n_keys, ROWS)
        start, stop = n_queries, 0
        full_start, full_stop = 0, n_queries
        for i in gl.static_range(KEYS // ROWS):
            block = start_key // ROWS + i
            if block < n_blocks:
                p_block = p_span + (batch * n_blocks + block) * 4
                some_start, some_stop = gl.load(p_block), gl.load(p_block + 3)
                start = min(start, some_start)
                stop = max(stop, some_stop if some_start < some_stop else 0)
                full_start = max(full_start, gl.load(p_block + 1))
                full_stop = min(full_stop, gl.load(p_block + 2))
        return start // BM * BM, full_start, full_stop, stop
    else:
        return query_span(start_key, n_queries, n_keys, window, KEYS, BM, CAUSAL, WINDOW)


@gluon.jit
def load_tiles(
    descriptors, tiles, barriers, place, lengths, span, D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, STORED: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values once, then every tile of queries and gradients that some warpgroup needs."""
    d_q, d_grad, d_q_columns, d_grad_columns, d_shift, d_delta, d_ratio, d_k, d_v = descriptors
    q, grad, q_columns, grad_columns, shift, delta, ratio, k, v = tiles
    ready, free, held = barriers
    i_kv, start_key, first_head, heads = place
    n_queries, n_keys, n_padded = lengths
    start, stop = span
    mbarrier.expect(held, 2 * CONSUMERS * d_k.block_type.nbytes)
    for i in gl.static_range(CONSUMERS):
        load_tile(d_k, [i_kv * n_keys + start_key + i * ROWS, 0], held, k.index(i))
        load_tile(d_v, [i_kv * n_keys + start_key + i * ROWS, 0], held, v.index(i))
    turn = 0
    for i_head in range(first_head, first_head + heads):
        for start_row in range(start, stop, BM):
            stage = wait_free(free, turn, STAGES)
            here = ready.index(stage)
            mbarrier.expect(here, 4 * d_q.block_type.nbytes + (3 if STORED else 2) * d_shift.block_type.nbytes)
            load_tile(d_q, [i_head * n_queries + start_row, 0], here, q.index(stage))
            load_tile(d_grad, [i_head * n_queries + start_row, 0], here, grad.index(stage))
            load_tile(d_shift, [i_head * n_padded + start_row], here, shift.index(stage))
            load_tile(d_delta, [i_head * n_padded + start_row], here, delta.index(stage))
            if STORED:
                load_tile(d_ratio, [i_head * n_padded + start_row], here, ratio.index(stage))
            load_tile(d_grad_columns, [i_head * D, start_row], here, grad_columns.index(stage))
            load_tile(d_q_columns, [i_head * D, start_row], here, q_columns.index(stage))
            turn += 1


@gluon.jit
def load_over(memory, descriptor, barrier):
    """Load the descriptor's tile at (0, 0) to shared memory that this warpgroup alone has read from, and wait for it."""
    loaded = reinterpret(memory, descriptor.dtype, descriptor.block_type.shape, descriptor.layout)
    fence_async_shared()
    mbarrier.expect(barrier, descriptor.block_type.nbytes)
    load_tile(descriptor, [0, 0], barrier, loaded)
    mbarrier.wait(barrier, 0)
    return loaded


@gluon.jit
def multiply_tiles(
    context, WHICH: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    MIX: gl.constexpr, TURNED: gl.constexpr, STORED: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    RANGES: gl.constexpr, PROMOTION: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dK and dV of the WHICH-th 64 keys of the block."""
    S: gl.constexpr = accumulator(BM)
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    tiles, barriers, place, lengths, span, scalars, pointers, strides, storing, dk_sum, d_signs, signs_ready = context
    d_stored, buffers, first_head_stored = storing
    q, grad, q_columns, grad_columns, shift, delta, ratio, k, v = tiles
    ready, free, held = barriers
    i_kv, block_key, first_head, heads = place
    n_queries, n_keys, _ = lengths
    block_start, block_stop = span
    window, softmax_scale, n_groups, n_heads, n_kv_heads = scalars
    p_q_quant_scale, p_k_quant_scale, p_range, p_span, p_group, p_cos, p_sin, p_dk, p_dv = pointers
    start_key = block_key + WHICH * ROWS
    batch, kv_head = i_kv // n_kv_heads, i_kv % n_kv_heads
    start, full_start, full_stop, stop = block_span(
        p_span, batch, start_key, n_queries, n_keys, window, ROWS, BM, CAUSAL, WINDOW, RANGES
    )
    if start_key >= n_keys:  # keys of the last block beyond the last
        start, stop = block_stop, block_stop
    k, v = k.index(WHICH), v.index(WHICH)
    dk = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    dv = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    unused = gl.zeros([ROWS, BM], gl.float32, S)
    unused_dv = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    memory = dk_sum.index(WHICH)
    dk_sum = reinterpret(memory, gl.float32, [DP // 8, 512], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    dk_sum.store(quads(dk, DP))
    dk_unit, dv_unit, sum_unit = 1.0, 1.0, 1.0
    mbarrier.wait(held, 0)
    if DP == 128:  # half of what S and dP read of shared memory, where the registers suffice
        k = k.load(gl.DotOperandLayout(0, S, 4))
    turn, n_stored = 0, 0
    for i_head in range(first_head, first_head + heads):
        factor = logit_factor(p_q_quant_scale, p_k_quant_scale, i_head % n_heads, kv_head, softmax_scale)
        for group in range(block_start // GROUP, gl.cdiv(block_stop, GROUP)):
            # rows of one group share the scales of dO′8 and dS8: the accumulators change units in between
            p_scales = p_group + (i_head * n_groups + group) * 4
            group_factor = gl.load(p_scales)
            dk_unit, new_dv_unit = gl.load(p_scales + 1), gl.load(p_scales + 2)
            rescale = sum_unit / dk_unit
            dv *= dv_unit / new_dv_unit
            dv_unit = new_dv_unit
            low, high = max(block_start, group * GROUP), min(block_stop, (group + 1) * GROUP)
            begin = min(max(start, low), high)
            end = max(min(stop, high), begin)
            turn = skip_tiles(ready, free, turn, low, begin, BM, STAGES)
            summed = 0
            for start_row in range(begin, end, BM):
                if summed == PROMOTION:
                    promote(dk_sum, rescale, dk, DP)
                    sum_unit, rescale, summed = dk_unit, 1.0, 0
                stage = wait_ready(ready, turn, STAGES)
                s = warpgroup_mma(k, q.index(stage).permute((1, 0)), unused, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, grad.index(stage).permute((1, 0)), unused, use_acc=False, is_async=True)
                row_shift = shift.index(stage).load(ROW)
                s = warpgroup_mma_wait(1, deps=[s])
                if (start_row < full_start) | (start_row >= full_stop):
                    rows = start_row + gl.arange(0, BM, ROW)
                    keys = start_key + gl.arange(0, ROWS, gl.SliceLayout(1, S))
                    position = rows + (n_keys - n_queries)
                    if CAUSAL:  # rows beyond the last have P̃ = 0 by their shift
                        s = gl.where(keys[:, None] <= position[None, :], s, HIDDEN)
                    if WINDOW:
                        s = gl.where(keys[:, None] > (position - window)[None, :], s, HIDDEN)
                    if RANGES:
                        p_row = p_range + (batch.to(gl.int64) * n_queries + gl.minimum(rows, n_queries - 1)) * 2
                        s = gl.where(keys[:, None] >= gl.load(p_row)[None, :], s, HIDDEN)
                        s = gl.where(keys[:, None] < gl.load(p_row + 1)[None, :], s, HIDDEN)
                p = gl.exp2(s * factor - row_shift[None, :])
                dp = warpgroup_mma_wait(0, deps=[dp])
                p8 = operand(p, BM)
                row_delta = delta.index(stage).load(ROW)  # as late as it goes: registers are short
                ds = p * (dp * group_factor - row_delta[None, :])
                ds8 = operand(ds, BM)
                if STORED:
                    pairs = round_pairs(ds * ratio.index(stage).load(ROW)[None, :], BM)
                grad_tile = grad_columns.index(stage).permute((1, 0))
                tile = warpgroup_mma(p8, grad_tile, unused_dv, use_acc=False, is_async=True)
                dk = warpgroup_mma(ds8, q_columns.index(stage).permute((1, 0)), dk, use_acc=summed > 0, is_async=True)
                if STORED:
                    i_tile = tile_number(
                        i_head - first_head_stored, start_row // ROWS, start_key // ROWS, gl.cdiv(n_queries, ROWS), window, WINDOW
                    )  # fmt: skip
                    store_pairs(d_stored, buffers.index(WHICH * BUFFERS + n_stored % BUFFERS), i_tile, pairs)
                    n_stored += 1
                dv += warpgroup_mma_wait(1, deps=[tile])
                dk = warpgroup_mma_wait(0, deps=[dk])
                summed += 1
                mbarrier.arrive(free.index(stage), count=1)
                turn += 1
            if summed > 0:
                promote(dk_sum, rescale, dk, DP)
                sum_unit = dk_unit
            turn = skip_tiles(ready, free, turn, end, high, BM, STAGES)
    if STORED:
        wait_stored()
    stride_b, stride_h, stride_l, _, _ = strides
    dv *= dv_unit
    store_tile(p_dv, dv, batch, kv_head, start_key, n_keys, stride_b, stride_h, stride_l, D, DP)
    dk = load_sum(dk_sum, sum_unit, DP)
    signs = load_over(memory, d_signs, signs_ready.index(WHICH)) if MIX else None
    store_gradient(p_dk, dk, signs, p_cos, p_sin, batch, kv_head, start_key, n_keys, strides, D, DP, MIX, TURNED)


@DirectKernel
@gluon.jit
def key_gradient_kernel(
    d_q,  # descriptors: (B·Hq·Lq, D) E4M3
    d_q_columns,  # (B·Hq·D, Lp)
    d_k,  # (B·Hkv·Lk, D)
    d_v,  # (B·Hkv·Lk, D)
    d_grad,  # (B·Hq·Lq, D): dO′8
    d_grad_columns,  # (B·Hq·D, Lp)
    d_shift,  # (B·Hq·Lp,)
    d_delta,  # (B·Hq·Lp,)
    d_ratio,  # (B·Hq·Lp,), with STORED
    d_stored,  # (tiles · 64, 32) int16, with STORED: dS8 of the heads from those of first_kv on
    d_signs,  # (64, 64) bfloat16, with MIX
    p_q_quant_scale,
    p_k_quant_scale,
    p_range,  # (B, Lq, 2) int32, with RANGES
    p_span,  # (B, ⌈Lk / 64⌉, 4), with RANGES
    p_group,  # (B, Hq, groups, 4)
    p_cos,  # (B or 1, Lk, D/2), with TURNED
    p_sin,
    p_dk,  # (B, Hkv, Lk, D), strides dk_*
    p_dv,  # same strides
    dk_b,
    dk_h,
    dk_l,
    cos_b,
    cos_l,
    first_kv,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    n_padded,
    n_groups,
    window,
    softmax_scale,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    DP: gl.constexpr,
    BM: gl.constexpr,
    MIX: gl.constexpr,
    TURNED: gl.constexpr,  # turn dK back through RoPE
    STORED: gl.constexpr,  # leave dS8 for dQ
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    RANGES: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PROMOTION: gl.constexpr,  # tiles of rows that the matrix unit sums for dK; for dV it sums one
):
    gl.static_assert(GROUP % BM == 0, "the rows of a tile must share a group's scales")
    gl.static_assert(BM == ROWS or not STORED, "a tile stored is 64 rows of 64 keys")
    KEYS: gl.constexpr = CONSUMERS * ROWS
    block, i_kv = heaviest_first(gl.cdiv(n_keys, KEYS))
    i_kv += first_kv
    start_key, heads = block * KEYS, n_heads // n_kv_heads
    start, _, _, stop = block_span(
        p_span, i_kv // n_kv_heads, start_key, n_queries, n_keys, window, KEYS, BM, CAUSAL, WINDOW, RANGES
    )
    descriptors = (d_q, d_grad, d_q_columns, d_grad_columns, d_shift, d_delta, d_ratio, d_k, d_v)
    tiles = (
        allocate(d_q, STAGES), allocate(d_grad, STAGES), allocate(d_q_columns, STAGES), allocate(d_grad_columns, STAGES),
        allocate(d_shift, STAGES), allocate(d_delta, STAGES), allocate(d_ratio, STAGES) if STORED else None,
        allocate(d_k, CONSUMERS), allocate(d_v, CONSUMERS),
    )  # fmt: skip
    barriers = ring_barriers(STAGES, CONSUMERS)
    place, lengths, span = (i_kv, start_key, i_kv * heads, heads), (n_queries, n_keys, n_padded), (start, stop)
    scalars = (window, softmax_scale, n_groups, n_heads, n_kv_heads)
    pointers = (p_q_quant_scale, p_k_quant_scale, p_range, p_span, p_group, p_cos, p_sin, p_dk, p_dv)
    strides = (dk_b, dk_h, dk_l, cos_b, cos_l)
    storing = (d_stored, allocate(d_stored, CONSUMERS * BUFFERS) if STORED else None, first_kv * heads)
    # aligned for what is loaded over it in the end
    dk_sum = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, 2 * DP], gl.NVMMASharedLayout(128, 16, 2))
    signs_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(signs_ready.index(i), count=1)
    context = (tiles, barriers, place, lengths, span, scalars, pointers, strides, storing, dk_sum, d_signs, signs_ready)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (multiply_tiles, (context, 0, GROUP, D, DP, BM, STAGES, MIX, TURNED, STORED, CAUSAL, WINDOW, RANGES, PROMOTION)),
                (multiply_tiles, (context, 1, GROUP, D, DP, BM, STAGES, MIX, TURNED, STORED, CAUSAL, WINDOW, RANGES, PROMOTION)),
                (load_tiles, (descriptors, tiles, barriers, place, lengths, span, D, BM, STAGES, CONSUMERS, STORED)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply_tiles, (context, 0, GROUP, D, DP, BM, STAGES, MIX, TURNED, STORED, CAUSAL, WINDOW, RANGES, PROMOTION)),
                (multiply_tiles, (context, 1, GROUP, D, DP, BM, STAGES, MIX, TURNED, STORED, CAUSAL, WINDOW, RANGES, PROMOTION)),
                (multiply_tiles, (context, 2, GROUP, D, DP, BM, STAGES, MIX, TURNED, STORED, CAUSAL, WINDOW, RANGES, PROMOTION)),
                (load_tiles, (descriptors, tiles, barriers, place, lengths, span, D, BM, STAGES, CONSUMERS, STORED)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
