"""What the fused kernels share inside one tile: operand order, row bounds, dropout, the Hadamard mix. Triton device functions."""

import math

import triton
import triton.language as tl
from triton import knobs

from ..scaling.formats import E4M3
from . import operands, reference
from .hadamard import SIGNS_MAX

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # whose `dot` multiplies bfloat16 bit patterns as integers
E4M3_MAX = tl.constexpr(E4M3.max)
PROBABILITY_LOG2 = tl.constexpr(math.log2(reference.PROBABILITY_QUANT_SCALE))
RESIDUAL_GAIN = tl.constexpr(operands.RESIDUAL_GAIN)
HEADS_AT_A_TIME = tl.constexpr(8)  # a guess; no other number was tried
MIX_WIDTH = tl.constexpr(SIGNS_MAX)

ROUND_FOUR = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")
"""PTX of four conversions float32 → E4M3 into one register: nearest, ties to even, ±448 beyond, NaN for NaN."""


@triton.jit
def contraction_order(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reorder the columns of an accumulator tile (ROWS, COLUMNS) to the order in which it enters the next product.

    A thread of a matrix unit holds columns {2t, 2t+1, 8+2t, 9+2t} of every 16 in an accumulator, and columns 4t … 4t+3 in an
    8-bit operand. Contracting in the order 0 1 8 9 2 3 10 11 … makes both the same registers: no shuffle, no shared memory.
    The other operand is stored in that order (`store_columns`), so the product is unchanged.
    """
    x = tl.reshape(x, (ROWS, COLUMNS // 16, 2, 4, 2))
    x = tl.permute(x, (0, 1, 3, 2, 4))
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def contracted_row(position):
    """Which row of the sequence enters a product at a position, in the order of `contraction_order`."""
    return (position & -16) | (((position >> 1) & 1) << 3) | (((position >> 2) & 3) << 1) | (position & 1)


@triton.jit
def paired_row(position):
    """Which row of the sequence enters a product at a position, where rows i and i + 8 of every 16 are stored side by side."""
    return (position & -16) | ((position & 1) << 3) | ((position >> 1) & 7)


@triton.jit
def to_e4m3(x):
    """Round float32 to E4M3: nearest, ties to even. Values beyond ±448 become ±448, and NaN stays NaN.

    Triton's own cast loses bytes where a tile is stored both as rows and as columns, with or without a
    clamp (triton#11111). Rows need words and columns need bytes. ptxas up to 12.9 merges the conversions of
    a word into one instruction. It extracts the bytes before that instruction, from registers that nothing
    has written. In `ROUND_FOUR` a conversion has no use but its word.
    """
    if INTERPRETED:
        x8 = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    else:
        x8 = tl.inline_asm_elementwise(ROUND_FOUR, "=r,r,r,r,r", [x], dtype=tl.float8e4nv, is_pure=True, pack=4)
    return x8


@triton.jit
def add_apart(total, factor, product):
    """total·factor + product, where the matrix unit sums the product's terms alone.

    FP8 units keep 13 bits of a sum (docs/sums.md). A compiler makes an addition after `dot` the unit's own, but no `fma`.
    """
    return tl.fma(total, tl.zeros_like(total) + factor, product)


@triton.jit
def heaviest_first(n_blocks):
    """(block, batch·head) of this program: block 0 of several heads first, so that a causal launch ends with its lightest blocks.

    Heads are taken a few at a time: programs that run together then share their operands in the L2 cache.
    """
    total = tl.num_programs(0) // n_blocks
    i_chunk = tl.program_id(0) // (n_blocks * HEADS_AT_A_TIME)
    i_inside = tl.program_id(0) % (n_blocks * HEADS_AT_A_TIME)
    heads = tl.minimum(total - i_chunk * HEADS_AT_A_TIME, HEADS_AT_A_TIME)
    return i_inside // heads, i_chunk * HEADS_AT_A_TIME + i_inside % heads


@triton.jit
def row_bounds(
    rows,
    i_batch,
    p_range,
    n_queries,
    n_keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
):
    """First and one-past-last key that each query row sees, as `Visibility.rows`; rows beyond the last see nothing."""
    valid = rows < n_queries
    last = tl.where(valid, n_keys, 0)
    first = rows * 0
    position = rows + (n_keys - n_queries)
    if CAUSAL:
        last = tl.minimum(last, position + 1)
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    if RANGES:
        p_row = p_range + (i_batch.to(tl.int64) * n_queries + rows) * 2
        first = tl.maximum(first, tl.load(p_row, mask=valid, other=0))
        last = tl.minimum(last, tl.load(p_row + 1, mask=valid, other=0))
    return first, last


@triton.jit
def key_span(
    rows,
    first,
    last,
    start_row,
    n_queries,
    n_keys,
    window,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
):
    """Keys [start, stop) that a block of rows may see, and [full_start, full_stop), whose tiles need no mask."""
    if RANGES:
        valid = rows < n_queries
        seen_from = tl.min(tl.where(valid & (first < last), first, n_keys))
        all_from = tl.max(tl.where(valid, first, 0))
        seen_to = tl.max(last)
        all_to = tl.min(tl.where(valid, last, n_keys))
    else:
        offset = n_keys - n_queries
        stop_row = tl.minimum(start_row + ROWS, n_queries)
        seen_from, all_from, seen_to, all_to = 0, 0, n_keys, n_keys
        if CAUSAL:
            seen_to = tl.minimum(tl.maximum(stop_row + offset, 0), n_keys)
            all_to = tl.minimum(tl.maximum(start_row + 1 + offset, 0), n_keys)
        if WINDOW:
            seen_from = tl.maximum(start_row + offset - window + 1, 0)
            all_from = tl.maximum(stop_row + offset - window, 0)
    start = seen_from // KEYS * KEYS
    stop = tl.maximum(seen_to, start)
    full_start = tl.minimum(tl.cdiv(all_from, KEYS) * KEYS, tl.cdiv(stop, KEYS) * KEYS)
    full_start = tl.maximum(full_start, start)
    full_stop = tl.maximum(all_to // KEYS * KEYS, full_start)
    full_stop = tl.minimum(full_stop, tl.cdiv(stop, KEYS) * KEYS)
    return start, full_start, full_stop, stop


@triton.jit
def dropout_keep(
    seed,
    threshold,
    i_batch_head,
    start_row,
    start_key,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which probabilities of a tile survive, as `philox.dropout_keep`: (ROWS, KEYS) bool, or (KEYS, ROWS) when TRANSPOSED."""
    rows = start_row + tl.arange(0, ROWS)
    quads = start_key // 4 + tl.arange(0, KEYS // 4)
    if TRANSPOSED:
        quads, rows = quads[:, None], rows[None, :]
    else:
        quads, rows = quads[None, :], rows[:, None]
    zero = (quads + rows) * 0
    w0, w1, w2, w3 = tl.philox(seed, quads + zero, rows + zero, zero + i_batch_head, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (KEYS, ROWS)) if TRANSPOSED else tl.reshape(words, (ROWS, KEYS))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def mix(x, p_hadamard, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard mix of each BLOCK of the last dimension: (ROWS, DIM) → float32, as `hadamard.hadamard`.

    A product with a matrix of ±1 (`hadamard_signs`), exact for bfloat16 and float16 input.
    """
    WIDTH: tl.constexpr = DIM if DIM < MIX_WIDTH else MIX_WIDTH
    row, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    signs = tl.load(p_hadamard + row * WIDTH + column)
    x = tl.reshape(x, (ROWS * DIM // WIDTH, WIDTH))
    if INTERPRETED:
        x = x.to(tl.float32)
    y = tl.dot(x, signs.to(x.dtype))
    y = tl.reshape(y, (ROWS, DIM))
    if BLOCK > WIDTH:  # one more butterfly between the two halves
        even, odd = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, WIDTH)), (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, DIM))
    return y * (BLOCK**-0.5)


@triton.jit
def tile_pointers(p, batch, head, start, stride_b, stride_h, stride_l, ROWS: tl.constexpr, DP: tl.constexpr):
    """Pointers to a tile (ROWS, DP) of a tensor (B, H, L, D), D contiguous: 64-bit base, 32-bit offsets inside the tile."""
    base = p + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + start.to(tl.int64) * stride_l
    return base + tl.arange(0, ROWS)[:, None] * stride_l + tl.arange(0, DP)[None, :]
