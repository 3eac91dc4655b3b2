"""Model of Hopper's FP8 matrix unit, whose accumulator keeps 13 bits, and bounds of its error.

One instruction adds 32 products to an accumulator, in four steps (F = 13):

1. Products of E4M3 numbers are exact. The exponent of a product is the sum of its factors' exponents, at least −6 each.
2. All 32 products and the accumulator are aligned to the largest exponent among them, e.
3. Each of the 33 is cut to a multiple of 2^(e − F), toward zero; the sum of the 33 is exact.
4. The sum is cut to F bits below its own leading bit, toward zero.

Sources. MMA-Sim (arXiv 2511.10909) has these steps for FP8 `wgmma` ("T-FDPA", F = 13, "RZ-E8M13"), and its authors
compare them with an H100 bit for bit. This model has the bits of MMA-Sim 2.1.1 (30,720 random sums, script not kept).
DeepSeek-V3's report (arXiv 2412.19437, section 3.5.2) has "the highest 14 bits", the leading bit included.
SageAttention2 (arXiv 2411.10958) has 1 sign bit, 8 exponent bits and 13 mantissa bits. BF16 products have F = 25 in
step 3, 23 bits in step 4 and 16 products an instruction (MMA-Sim).
"""

import math

import torch
from torch import Tensor

BITS = 13
"""Bits that FP8 instructions keep below the largest exponent (F)."""

WIDTH = 32
"""FP8 products that one instruction adds."""

LEAST_POWER = 2.0**-6
"""Least power of two that counts as an exponent of E4M3: that of its least normal number."""

ENTRIES = 2**17
"""Products handled at a time: as many as stay in a processor's cache."""

EXACT_IN_FLOAT32 = 13
"""F up to which sums of cut terms are integers below 2²⁴: 33 terms below 4·2^F."""


def keep_bits(x: Tensor, bits: int) -> Tensor:
    """x cut toward zero to `bits` bits below its leading one; with 0 bits ±2^⌊log₂|x|⌋. float32 or float64."""
    integer, mantissa = (torch.int32, 23) if x.dtype == torch.float32 else (torch.int64, 52)
    return (x.view(integer) & -(1 << (mantissa - bits))).view(x.dtype)


def magnitude(x8: Tensor) -> Tensor:
    """|x|, but at least `LEAST_POWER` for every number that is not 0: the magnitude that the bounds count with."""
    x = x8.float().abs()
    return torch.where(x == 0, x, x.clamp_min(LEAST_POWER))


def multiply_add(
    a8: Tensor,  # (M, K) E4M3, or BF16 with other bits
    b8: Tensor,  # (K, N)
    accumulator: Tensor,  # (M, N) float32
    bits: int = BITS,
    width: int = WIDTH,
    kept: int | None = None,
    least_power: float = LEAST_POWER,
) -> Tensor:
    """accumulator + a8·b8 as a chain of instructions: (M, N) float32.

    Args:
        bits: F of step 3.
        width: products of an instruction; a last one with fewer adds zeros.
        kept: bits of step 4; default: `bits`.
        least_power: least power of two that counts as an operand's exponent.
    """
    kind, integer = (torch.float32, torch.int32) if bits <= EXACT_IN_FLOAT32 else (torch.float64, torch.int64)
    a, b, total = a8.to(kind), b8.to(kind), accumulator.to(kind, copy=True)
    a_power, b_power = (torch.where(x == 0, x, keep_bits(x.abs(), 0).clamp_min(least_power)) for x in (a, b))
    a, a_power = (x.T[:, :, None].contiguous() for x in (a, a_power))  # (K, M, 1)
    b, b_power = (x[:, None] for x in (b, b_power))  # (K, 1, N)
    kept, least = bits if kept is None else kept, torch.finfo(kind).tiny
    for rows in torch.arange(a.shape[1]).split(max(ENTRIES // (width * b.shape[2]), 1)):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        work = torch.empty(width, len(rows), b.shape[2], dtype=kind)
        steps = torch.empty_like(work, dtype=integer)
        for some in torch.arange(a.shape[0]).split(width):
            of = slice(int(some[0]), int(some[-1]) + 1)
            terms, whole = work[: len(some)], steps[: len(some)]
            largest = torch.mul(a_power[of, at], b_power[of], out=terms).amax(0)
            unit = torch.maximum(largest, keep_bits(total[at].abs(), 0)).mul_(2.0**-bits).clamp_min_(least)
            scale = 1 / unit
            whole.copy_(torch.mul(a[of, at], b[of], out=terms).mul_(scale))  # toward zero, as torch.trunc but faster
            before = (total[at] * scale).to(integer).to(kind)
            total[at] = keep_bits((terms.copy_(whole).sum(0) + before) * unit, kept)
    return total.float()


def fp8_matmul(
    a8: Tensor,  # (M, K)
    b8: Tensor,  # (K, N)
    interval: int | None,
    bits: int = BITS,
    width: int = WIDTH,
) -> Tensor:
    """a8·b8, where a fresh accumulator takes each `interval` products, and float32 the sum of them: (M, N) float32.

    Args:
        interval: products of one accumulator; None: all of them.
    """
    sums = RunningSum(a8.shape[0], b8.shape[1], interval, bits, width)
    sums.add(a8, b8)
    return sums.value()


class RunningSum:
    """A sum of tile products as a kernel keeps it: an accumulator of the matrix unit, added to float32 when an interval is full."""

    def __init__(self, rows: int, columns: int, interval: int | None, bits: int = BITS, width: int = WIDTH):
        self.interval, self.bits, self.width = interval, bits, width
        self.accumulator = torch.zeros(rows, columns)
        self.total = torch.zeros(rows, columns)
        self.taken = 0

    def add(
        self,
        a8: Tensor,  # (M, K)
        b8: Tensor,  # (K, N)
    ) -> None:
        start, stop = 0, a8.shape[1]
        while start < stop:
            end = stop if self.interval is None else min(stop, start + self.interval - self.taken)
            some = slice(start, end)
            self.accumulator = multiply_add(a8[:, some], b8[some], self.accumulator, self.bits, self.width)
            self.taken += end - start
            if self.taken == self.interval:
                self._promote()
            start = end

    def rescale(self, factor: Tensor) -> None:
        """Multiply what is there by factors of its rows, (M, 1), or by one."""
        self.accumulator, self.total = self.accumulator * factor, self.total * factor

    def value(self) -> Tensor:
        return self.total + self.accumulator

    def _promote(self) -> None:
        self.total, self.taken = self.value(), 0
        self.accumulator = torch.zeros_like(self.accumulator)


def sum_bound(products: int, interval: int | None, bits: int = BITS) -> float:
    """c: the error of a sum of E4M3 products is at most c·Σ magnitude(a)·magnitude(b), whatever they are.

    (T − 1)·2^−F for each T products that share an accumulator, and two roundings to float32 (2⁻²⁴) at each of their additions: the
    rescaled sum's, and the new sum's. Derived in docs/sums.md, "The bound".
    """
    shared = products if interval is None else min(interval, products)
    additions = math.ceil(products / shared) if shared < products else 0
    return (shared - 1) * 2.0**-bits + 2 * additions * 2.0**-24


def mean_bias(products: int, interval: int | None, spread: float = 2.0, bits: int = BITS, width: int = WIDTH) -> float:
    """What a sum of like products loses on average, relative to the sum, if what is cut off is half a unit on average.

    Args:
        spread: largest product of an instruction over the mean one.
    """
    shared = products if interval is None else min(interval, products)
    instructions = math.ceil(shared / width)
    unit = 2.0**-bits
    return unit * (width * (instructions - 1) / 4 + spread / 2 + (instructions + 1) / 4)
