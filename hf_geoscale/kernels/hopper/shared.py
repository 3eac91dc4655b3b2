"""What the Hopper kernels share: a ring of tiles in shared memory that one warp fills and warpgroups empty. Gluon.

Why another set of kernels: in the portable ones each program of 64 rows loads every tile for itself, which takes 70 to 85 %
of the L2 cache's bandwidth, and its own warps issue the loads. Here two or three warpgroups share each tile, and a warp of its own
loads it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from .. import forward as portable_forward
from .. import key_gradient as portable_key_gradient
from .. import tile

ROWS = gl.constexpr(64)
"""Rows of the accumulators of one warpgroup: query rows in the forward and dQ, keys in dK and dV."""

HIDDEN = portable_forward.HIDDEN
LOG2_E = portable_forward.LOG2_E
NOTHING_SEEN = portable_forward.NOTHING_SEEN
PROBABILITY_LOG2 = tile.PROBABILITY_LOG2

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Start loading a tile from global to shared memory: (descriptor, position, barrier, destination). Triton renamed it after 3.6."""

start_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""Start storing a tile from shared to global memory: (descriptor, position, source). Renamed, too."""

_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
"""The same shared memory as something else: (memory, dtype, shape, layout). Renamed, too."""

# functions of scalars and rows that the portable kernels have already
heaviest_first = gluon.jit(tile.heaviest_first.fn)
key_span = gluon.jit(tile.key_span.fn)
logit_factor = gluon.jit(portable_forward.logit_factor.fn)
query_span = gluon.jit(portable_key_gradient.query_span.fn)
row_bounds = gluon.jit(tile.row_bounds.fn)


@gluon.constexpr_function
def accumulator(columns, depth=32):
    """Layout of a (64, columns) accumulator of one warpgroup; `depth` elements are contracted at once: 32 of 8, 16 of 16 bits."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, depth])


@gluon.jit
def operand(x, COLUMNS: gl.constexpr):
    """An accumulator tile (64, COLUMNS), rounded to E4M3, as the left operand of the next product: `tile.contraction_order`."""
    x = x.to(gl.float8e4nv).reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator(COLUMNS), 4)
    return gl.convert_layout(x.reshape([ROWS, COLUMNS]), layout, assert_trivial=True)


@gluon.jit
def allocate(descriptor, COUNT: gl.constexpr):
    """Room for COUNT tiles of a descriptor in shared memory."""
    return gl.allocate_shared_memory(
        descriptor.dtype,
        [COUNT] + descriptor.block_type.shape,  # noqa: RUF005 - Gluon has no star
        descriptor.layout,
    )


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers (ready, free) per stage of the ring, and one for the tiles that stay for the whole program."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    held = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    mbarrier.init(held, count=1)
    return ready, free, held


@gluon.jit
def wait_free(free, turn, STAGES: gl.constexpr):
    """Wait until every warpgroup has emptied the stage that takes tile number `turn`; return the stage."""
    stage = turn % STAGES
    mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
    return stage


@gluon.jit
def wait_ready(ready, turn, STAGES: gl.constexpr):
    """Wait until tile number `turn` has arrived; return its stage."""
    stage = turn % STAGES
    mbarrier.wait(ready.index(stage), turn // STAGES & 1)
    return stage


@gluon.jit
def skip_tiles(ready, free, turn, start, stop, LENGTH: gl.constexpr, STAGES: gl.constexpr):
    """Pass over the tiles between two positions, which only other warpgroups need; return the number of the next tile."""
    for _ in range(gl.cdiv(stop, LENGTH) - gl.cdiv(start, LENGTH)):
        stage = wait_ready(ready, turn, STAGES)
        mbarrier.arrive(free.index(stage), count=1)
        turn += 1
    return turn


@gluon.jit
def halves(x):
    """Left and right half of an accumulator tile: registers of the same thread."""
    return x.reshape([ROWS, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def row_maximum(x):
    """Maximum of each row of a tile (64, 128), halves first: no comparison waits for the one before."""
    left, right = halves(x)
    x = gl.maximum(left, right)
    left, right = halves(x)
    x = gl.maximum(left, right)
    left, right = halves(x)
    x = gl.maximum(left, right)
    left, right = halves(x)
    return gl.max(gl.maximum(left, right), 1)


@gluon.jit
def row_total(x):
    """Sum of each row of a tile (64, 128), in the order of `row_maximum`."""
    left, right = halves(x)
    x = left + right
    left, right = halves(x)
    x = left + right
    left, right = halves(x)
    x = left + right
    left, right = halves(x)
    return gl.sum(left + right, 1)


@gluon.jit
def join_halves(left, right):
    """The accumulator tile that `halves` took apart."""
    x = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * left.shape[1]])
    return gl.convert_layout(x, accumulator(2 * left.shape[1]), assert_trivial=True)


@gluon.jit
def times_signs(x, signs):
    """A tile (64, 64), rounded to BF16, times a matrix of ±1 (64, 64) in shared memory: float32."""
    layout: gl.constexpr = accumulator(64, 16)
    left = gl.convert_layout(x.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2), assert_trivial=True)
    return warpgroup_mma(left, signs, gl.zeros([ROWS, 64], gl.float32, layout), use_acc=False)


@gluon.jit
def mix(x, signs, DP: gl.constexpr, BLOCK: gl.constexpr):
    """Orthonormal Hadamard mix of each BLOCK of the last dimension of an accumulator (64, DP); as `tile.mix`."""
    if DP == 64:
        x = times_signs(x, signs)
    else:
        left, right = halves(x)
        left = times_signs(gl.convert_layout(left, accumulator(64), assert_trivial=True), signs)
        right = times_signs(gl.convert_layout(right, accumulator(64), assert_trivial=True), signs)
        if BLOCK > 64:  # one more butterfly between the two halves
            left, right = left + right, left - right
        x = join_halves(left, right)
    return x * (BLOCK**-0.5)


@gluon.jit
def store_tile(p, x, batch, head, start, n_rows, stride_b, stride_h, stride_l, D: gl.constexpr, DP: gl.constexpr):
    """Store an accumulator tile (64, DP) to rows from `start` of a tensor (B, H, L, D), D contiguous."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    dims = gl.arange(0, DP, gl.SliceLayout(0, layout))[None, :]
    base = p + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + start.to(gl.int64) * stride_l
    x = gl.convert_layout(x.to(p.dtype.element_ty), layout)
    gl.store(base + rows * stride_l + dims, x, mask=(start + rows < n_rows) & (dims < D))


@gluon.jit
def store_rotated_back(
    p, x, p_cos, p_sin, batch, head, start, n_rows, stride_b, stride_h, stride_l, cos_b, cos_l, D: gl.constexpr
):  # fmt: skip
    """Turn a gradient accumulator (64, D) back (`quantize.load_rotated` with BACK) and store it as `store_tile` does.

    Channels d and d + D/2 of a row are registers of the same thread.
    """
    HALF: gl.constexpr = D // 2
    left, right = halves(x)
    layout: gl.constexpr = left.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    angle = rows * cos_l + gl.arange(0, HALF, gl.SliceLayout(0, layout))[None, :]
    o_base = batch.to(gl.int64) * cos_b + start.to(gl.int64) * cos_l
    cos = gl.load(p_cos + o_base + angle, mask=start + rows < n_rows, other=0.0).to(gl.float32)
    sin = gl.load(p_sin + o_base + angle, mask=start + rows < n_rows, other=0.0).to(gl.float32)
    store_tile(p, left * cos + right * sin, batch, head, start, n_rows, stride_b, stride_h, stride_l, HALF, HALF)
    store_tile(p + HALF, right * cos - left * sin, batch, head, start, n_rows, stride_b, stride_h, stride_l, HALF, HALF)


@gluon.jit
def store_gradient(
    p, x, signs, p_cos, p_sin, batch, head, start, n_rows, strides, D: gl.constexpr, DP: gl.constexpr, MIX: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """Store a gradient accumulator (64, DP) of q or k: mixed back, and with TURNED turned back through RoPE.

    Args:
        strides: of p along sequences, heads and rows, of p_cos and p_sin along sequences and rows.
    """
    stride_b, stride_h, stride_l, cos_b, cos_l = strides
    if MIX:
        x = mix(x, signs, DP, MIX)
    if TURNED:
        store_rotated_back(
            p, x, p_cos, p_sin, batch, head, start, n_rows, stride_b, stride_h, stride_l, cos_b, cos_l, D
        )
    else:
        store_tile(p, x, batch, head, start, n_rows, stride_b, stride_h, stride_l, D, DP)


@gluon.jit
def query_gradient_unit(
    p_k_quant_scale, p_v_quant_scale, p_group, i_head, kv_head, start_row, n_groups, softmax_scale, GROUP: gl.constexpr
):  # fmt: skip
    """What a dQ accumulator of rows from `start_row` counts in, times their row factors."""
    i_group = i_head * n_groups + min(start_row // GROUP, n_groups - 1)  # rows past the last are not stored
    unit = softmax_scale / 256 * gl.load(p_group + i_group * 4 + 3)
    return unit / gl.load(p_k_quant_scale + kv_head) / gl.load(p_v_quant_scale + kv_head)


@gluon.jit
def block_of_rows(
    p_range, n_heads, n_queries, n_keys, window, BN: gl.constexpr, CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    """This program's (batch·head, first row, first key, last key): the keys are those that any of its 64·CONSUMERS rows sees."""
    BLOCK: gl.constexpr = CONSUMERS * ROWS
    n_blocks = gl.cdiv(n_queries, BLOCK)
    block, i_head = heaviest_first(n_blocks)
    start_row = (n_blocks - 1 - block) * BLOCK
    rows, first, last = 0, 0, 0
    if RANGES:
        rows = start_row + gl.arange(
            0, 256, gl.BlockedLayout([1], [32], [4], [0])
        )  # a power of two that holds three times 64
        first, last = row_bounds(rows, i_head // n_heads, p_range, n_queries, n_keys, window, CAUSAL, WINDOW, RANGES)
        last = gl.where(rows < start_row + BLOCK, last, 0)
    start, _, _, stop = key_span(
        rows, first, last, start_row, n_queries, n_keys, window, BN, BLOCK, CAUSAL, WINDOW, RANGES
    )
    return i_head, start_row, start, stop
