"""dS8 on its way through memory, from the kernel of dK and dV, which computes it, to that of dQ: five products instead of seven.

A warpgroup holds dSᵀ as (64 keys, 64 rows), and dQ = dS·K contracts over keys, along which an 8-bit operand must be contiguous.
Keys i and i + 8 of every 16 belong to the same thread: rounded together they are one 16-bit element, and matrices of these are
transposed on their way to shared memory (`stmatrix.trans`). So keys are stored in the order 0 8 1 9 … (`tile.paired_row`), as are
the columns of k8, the other operand. A tile is 64 rows × 64 keys, 4 KiB; only those that somebody sees are stored. Each row has
its own scale.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launcher import DirectKernel
from .shared import (
    ROWS,
    accumulator,
    allocate,
    heaviest_first,
    load_tile,
    query_gradient_unit,
    ring_barriers,
    skip_tiles,
    start_store,
    store_gradient,
    wait_free,
    wait_ready,
)

BUFFERS = gl.constexpr(2)
"""Tiles of a warpgroup on their way from shared memory to global memory."""


@gluon.jit
def tiles_of_row(n_tiles, window, WINDOW: gl.constexpr):
    """Tiles of keys, at most, that a tile of rows sees of causal attention with as many queries as keys."""
    if WINDOW:
        return min((window + ROWS - 2) // ROWS + 1, n_tiles)
    else:
        return n_tiles


@gluon.jit
def tile_number(i_head, row_tile, key_tile, n_tiles, window, WINDOW: gl.constexpr):
    """Place of a tile among those stored: by head, row and key."""
    if WINDOW:
        band = tiles_of_row(n_tiles, window, WINDOW)
        return (i_head * n_tiles + row_tile) * band + key_tile - row_tile + band - 1
    else:
        return i_head * (n_tiles * (n_tiles + 1) // 2) + row_tile * (row_tile + 1) // 2 + key_tile


@gluon.jit
def round_pairs(x, COLUMNS: gl.constexpr):
    """An accumulator tile (64, COLUMNS), rounded to E4M3 in pairs of rows i and i + 8 of every 16: (32, COLUMNS) int16."""
    low, high = x.reshape([ROWS // 16, 2, 8, COLUMNS]).permute([0, 2, 3, 1]).split()
    pairs = gl.inline_asm_elementwise(
        """{
        .reg .b16 first, second;
        cvt.rn.satfinite.e4m3x2.f32 first, $3, $1;
        cvt.rn.satfinite.e4m3x2.f32 second, $4, $2;
        mov.b32 $0, {first, second};
        }""",
        "=r,f,f,f,f",
        [low, high],
        dtype=gl.int16,
        is_pure=True,
        pack=2,
    )
    return pairs.reshape([ROWS // 2, COLUMNS])


@gluon.jit
def store_pairs(d_stored, buffer, i_tile, pairs):
    """Start storing a tile of 64 keys and 64 rows, of `round_pairs`, row by row. Buffers take turns, store by store."""
    tma.store_wait(pendings=BUFFERS - 1)
    buffer.permute((1, 0)).store(pairs)
    fence_async_shared()
    start_store(d_stored, [i_tile * ROWS, 0], buffer)


@gluon.jit
def wait_stored():
    """Wait until shared memory is free of what `store_pairs` stores: before a program ends."""
    tma.store_wait(pendings=0)


@gluon.jit
def load_tiles(
    descriptors, tiles, barriers, place, span, window, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MIX: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The loading warp: every tile of keys once, and with it the tiles of dS8 of all warpgroups."""
    d_stored, d_k_columns, d_signs = descriptors
    ds, k_columns, signs = tiles
    ready, free, held = barriers
    i_stored, i_kv, first_tile, n_tiles = place
    start, stop, band = span
    if MIX:
        mbarrier.expect(held, d_signs.block_type.nbytes)
        load_tile(d_signs, [0, 0], held, signs.index(0))
    turn = 0
    for key_tile in range(start, stop):
        stage = wait_free(free, turn, STAGES)
        here = ready.index(stage)
        mbarrier.expect(here, d_k_columns.block_type.nbytes + CONSUMERS * d_stored.block_type.nbytes)
        load_tile(d_k_columns, [i_kv * D, key_tile * ROWS], here, k_columns.index(stage))
        for i in gl.static_range(CONSUMERS):
            row_tile = min(first_tile + i, n_tiles - 1)
            # one that was stored, in place of one that no row sees
            stored = min(max(key_tile, row_tile - band + 1), row_tile)
            i_tile = tile_number(i_stored, row_tile, stored, n_tiles, window, WINDOW)
            load_tile(d_stored, [i_tile * ROWS, 0], here, ds.index(stage * CONSUMERS + i))
        turn += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def multiply_tiles(
    context, WHICH: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, MIX: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dQ of the WHICH-th 64 rows of the block."""
    tiles, barriers, place, span, scalars, pointers, strides = context
    ds, k_columns, signs = tiles
    ready, free, held = barriers
    i_head, i_kv, first_tile, n_queries = place
    block_start, block_stop, band = span
    softmax_scale, n_groups, n_heads, n_kv_heads = scalars
    p_k_quant_scale, p_v_quant_scale, p_row_factor, p_group, p_cos, p_sin, p_dq = pointers
    batch, head, kv_head = i_head // n_heads, i_head % n_heads, i_kv % n_kv_heads
    row_tile = first_tile + WHICH
    start_row = row_tile * ROWS
    start = min(max(row_tile - band + 1, block_start), block_stop)
    stop = min(row_tile + 1, block_stop)
    dq = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    unused = gl.zeros([ROWS, DP], gl.float32, accumulator(DP))
    turn = skip_tiles(ready, free, gl.to_tensor(0), block_start, start, 1, STAGES)
    for _ in range(start, stop):
        stage = wait_ready(ready, turn, STAGES)
        ds_tile, k_tile = ds.index(stage * CONSUMERS + WHICH), k_columns.index(stage).permute((1, 0))
        tile = warpgroup_mma(ds_tile, k_tile, unused, use_acc=False, is_async=True)
        dq += warpgroup_mma_wait(0, deps=[tile])
        mbarrier.arrive(free.index(stage), count=1)
        turn += 1
    skip_tiles(ready, free, turn, stop, block_stop, 1, STAGES)
    rows = start_row + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(DP)))
    row_factor = gl.load(p_row_factor + i_head.to(gl.int64) * n_queries + rows, mask=rows < n_queries, other=1.0)
    unit = query_gradient_unit(
        p_k_quant_scale, p_v_quant_scale, p_group, i_head, kv_head, start_row, n_groups, softmax_scale, GROUP
    )
    dq *= (unit / row_factor)[:, None]
    if MIX:
        mbarrier.wait(held, 0)
    signs = signs.index(0) if MIX else None
    store_gradient(p_dq, dq, signs, p_cos, p_sin, batch, head, start_row, n_queries, strides, D, DP, MIX, TURNED)


@DirectKernel
@gluon.jit
def query_product_kernel(
    d_stored,  # descriptors: (tiles · 64, 64) E4M3, of the heads from first_head on
    d_k_columns,  # (B·Hkv·D, Lp), in the order of `tile.paired_row`
    d_signs,  # (64, 64) bfloat16, with MIX
    p_k_quant_scale,
    p_v_quant_scale,
    p_row_factor,  # (B, Hq, Lq)
    p_group,  # (B, Hq, groups, 4)
    p_cos,  # (B or 1, Lq, D/2), with TURNED
    p_sin,
    p_dq,  # (B, Hq, Lq, D), strides dq_*
    dq_b,
    dq_h,
    dq_l,
    cos_b,
    cos_l,
    first_head,
    n_heads,
    n_kv_heads,
    n_queries,
    n_groups,
    window,
    softmax_scale,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    DP: gl.constexpr,
    MIX: gl.constexpr,
    TURNED: gl.constexpr,  # turn dQ back through RoPE
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PROMOTION: gl.constexpr,
):
    """dQ = dS8·K8 of some heads, one program per block of query rows and query head, 64 rows per warpgroup."""
    gl.static_assert(PROMOTION == 1, "each tile is summed on its own")
    gl.static_assert(GROUP % ROWS == 0, "the rows of a tile must share a group's scales")
    gl.static_assert(CONSUMERS == 3, "one partition a warpgroup stands below")
    n_blocks = gl.cdiv(n_queries, CONSUMERS * ROWS)
    block, i_stored = heaviest_first(n_blocks)
    first_tile = (n_blocks - 1 - block) * CONSUMERS
    i_head = first_head + i_stored
    i_kv = i_head // (n_heads // n_kv_heads)
    n_tiles = gl.cdiv(n_queries, ROWS)
    band = tiles_of_row(n_tiles, window, WINDOW)
    span = (max(first_tile - band + 1, 0), min(first_tile + CONSUMERS, n_tiles), band)
    descriptors = (d_stored, d_k_columns, d_signs)
    tiles = (
        allocate(d_stored, STAGES * CONSUMERS), allocate(d_k_columns, STAGES), allocate(d_signs, 1) if MIX else None,
    )  # fmt: skip
    barriers = ring_barriers(STAGES, CONSUMERS)
    source = (i_stored, i_kv, first_tile, n_tiles)
    place, scalars = (i_head, i_kv, first_tile, n_queries), (softmax_scale, n_groups, n_heads, n_kv_heads)
    pointers = (p_k_quant_scale, p_v_quant_scale, p_row_factor, p_group, p_cos, p_sin, p_dq)
    context = (tiles, barriers, place, span, scalars, pointers, (dq_b, dq_h, dq_l, cos_b, cos_l))
    gl.warp_specialize(
        [
            (multiply_tiles, (context, 0, GROUP, D, DP, STAGES, CONSUMERS, MIX, TURNED)),
            (multiply_tiles, (context, 1, GROUP, D, DP, STAGES, CONSUMERS, MIX, TURNED)),
            (multiply_tiles, (context, 2, GROUP, D, DP, STAGES, CONSUMERS, MIX, TURNED)),
            (load_tiles, (descriptors, tiles, barriers, source, span, window, D, STAGES, CONSUMERS, MIX, WINDOW)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
