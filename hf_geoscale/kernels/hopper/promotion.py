"""A float32 sum in shared memory, to which a warpgroup adds its accumulator now and then. Gluon.

The matrix unit keeps 13 bits of a sum of FP8 products (docs/sums.md), so it may not sum for long. A longer sum lies in shared
memory where registers are short.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .shared import ROWS, accumulator


@gluon.jit
def quads(x, COLUMNS: gl.constexpr):
    """An accumulator tile (64, COLUMNS) as (COLUMNS/8, 512): four registers of each thread lie side by side, thread by thread.

    So it passes through shared memory in 16-byte accesses without a bank conflict.
    """
    x = x.reshape([4, 2, 8, COLUMNS // 16, 2, 4, 2]).permute([3, 1, 0, 2, 5, 4, 6])
    return x.reshape([COLUMNS // 8, 512])


@gluon.jit
def from_quads(x, COLUMNS: gl.constexpr):
    """The accumulator tile that `quads` took apart."""
    x = x.reshape([COLUMNS // 16, 2, 4, 8, 4, 2, 2]).permute([2, 1, 3, 0, 5, 4, 6]).reshape([ROWS, COLUMNS])
    return gl.convert_layout(x, accumulator(COLUMNS), assert_trivial=True)


@gluon.jit
def promote(total, ratio, x, COLUMNS: gl.constexpr):
    """Add an accumulator tile (64, COLUMNS) to the sum in shared memory, times `ratio` first."""
    added = quads(x, COLUMNS)
    total.store(total.load(added.type.layout) * ratio + added)


@gluon.jit
def load_sum(total, unit, COLUMNS: gl.constexpr):
    """The sum in shared memory, times `unit`, as an accumulator tile (64, COLUMNS)."""
    layout: gl.constexpr = quads(gl.zeros([ROWS, COLUMNS], gl.float32, accumulator(COLUMNS)), COLUMNS).type.layout
    return from_quads(total.load(layout), COLUMNS) * unit
