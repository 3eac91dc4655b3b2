"""The model of the FP8 matrix unit, the bound of its error, and the intervals after which the kernels add to float32."""

import pytest
import torch
from torch import Tensor

from hf_geoscale.kernels.backend import TRITON_INSTALLED
from hf_geoscale.kernels.tiles import DEFAULTS, INTERPRETED, TABLE

from ..tolerances import COHERENT_ERROR, E4M3_STEP, matrix_unit_error
from .accumulator import WIDTH, fp8_matmul, magnitude, mean_bias, multiply_add, sum_bound
from .attention_model import Tiling, hopper_tilings, portable_tiling
from .samples import relative

E4M3 = torch.float8_e4m3fn
INTERVALS = (32, 64, 128, 256, None)
CHANNELS = (64, 128, 256)
LENGTH = 2048
COLUMNS = 16


def add(accumulator: float, *terms: float) -> float:
    """An accumulator after one instruction on products of these numbers with 1."""
    a = torch.tensor([*terms, *[0.0] * (WIDTH - len(terms))])[None].to(E4M3)
    return float(multiply_add(a, torch.ones(WIDTH, 1).to(E4M3), torch.full((1, 1), accumulator)))


class TestOneInstruction:
    def test_a_term_is_cut_to_13_bits_below_the_largest_exponent(self):
        assert add(0, 256, 2.0**-5) == 256 + 2.0**-5
        assert add(0, 256, 2.0**-6) == 256
        assert add(0, 256, 1.5 * 2.0**-5) == 256 + 2.0**-5

    def test_a_term_is_cut_toward_zero(self):
        assert add(0, 256, -1.5 * 2.0**-5) == 256 - 2.0**-5
        assert add(0, -256, 1.5 * 2.0**-5) == -256 + 2.0**-5

    def test_the_accumulator_is_one_of_the_terms(self):
        assert add(2.0**13, 1) == 2.0**13 + 1
        assert add(2.0**14, 1) == 2.0**14
        assert add(2.0**-6, 256) == 256
        assert add(2.0**-6, 256, -256) == 0
        assert add(2.0**-5, 256, -256) == 2.0**-5

    def test_the_sum_is_cut_to_13_bits(self):
        assert add(1 + 2.0**-20, 0) == 1
        assert add(-1 - 2.0**-20, 0) == -1
        assert add(1 + 2.0**-13, 1) == 2

    def test_a_product_has_the_exponent_of_its_factors(self):
        """1.5 · 1.5 = 2.25 counts with exponent 0: a renormalised one would take a bit from the others."""
        a = torch.tensor([[1.5, -1.5, 2.0**-6, *[0.0] * 29]]).to(E4M3)
        b = torch.tensor([[1.5, 1.5, 2.0**-7, *[0.0] * 29]]).T.to(E4M3)
        assert float(multiply_add(a, b, torch.zeros(1, 1))) == 2.0**-13

    def test_a_subnormal_factor_has_the_least_exponent(self):
        """2⁻⁹ · 256 = 2⁻¹ counts with exponent −6 + 8, so that 2⁻¹² is lost beside it."""
        a = torch.tensor([[2.0**-9, -(2.0**-9), 2.0**-6, *[0.0] * 29]]).to(E4M3)
        b = torch.tensor([[256.0, 256.0, 2.0**-6, *[0.0] * 29]]).T.to(E4M3)
        assert float(multiply_add(a, b, torch.zeros(1, 1))) == 0

    def test_an_accumulator_that_float32_takes_over_keeps_what_another_loses(self):
        ones = torch.ones(1, 2**15).to(E4M3)
        assert float(fp8_matmul(ones, ones.T, None)) == 2.0**14
        assert float(fp8_matmul(ones, ones.T, 128)) == 2.0**15


def _signed(x: Tensor) -> Tensor:
    return x * (1 - 2 * (torch.arange(x.shape[-1]) % 2))


def inputs(kind: str, length: int, shared: int) -> tuple[Tensor, Tensor]:
    """E4M3 operands (COLUMNS, length) and (length, COLUMNS), of sums whose accumulators take `shared` products each."""
    generator = torch.Generator().manual_seed(len(kind) + length)
    rows = torch.rand(COLUMNS, length, generator=generator) + 0.5
    columns = torch.rand(COLUMNS, length, generator=generator) + 0.5
    position = torch.arange(length)
    if kind in ("dominating", "one dominating an instruction"):
        # 7.5 is the largest E4M3 number below 2⁻¹³ of 256 · 256: all of it is cut off
        first = position % (shared if kind == "dominating" else WIDTH) == 0
        rows, columns = torch.where(first, 256.0, 1.0)[None], torch.where(first, 256.0, 7.5)[None]
        rows, columns = rows.repeat(COLUMNS, 1), columns.repeat(COLUMNS, 1)
    elif kind == "alternating":
        rows = _signed(rows)
    elif kind == "growing":
        rows = rows * torch.exp2(16.0 * (position % shared) / shared - 8)
    elif kind == "shrinking":
        rows = rows * torch.exp2(8 - 16.0 * (position % shared) / shared)
    elif kind == "spread":
        rows, columns = (x * torch.exp2(8 * torch.rand(x.shape, generator=generator)) for x in (rows, columns))
    elif kind == "subnormal":
        rows = rows * torch.where(position % WIDTH == 0, 2.0**-8, 2.0**-9)
        columns = columns * torch.where(position % WIDTH == 0, 200.0, 2.0**-7)
    elif kind == "zeros":  # as hidden keys are, beside large values: a product of nothing must have no exponent
        rows = torch.where(position % 2 == 0, 0.0, 2.0**-6)[None].repeat(COLUMNS, 1)
        columns = torch.where(position % 2 == 0, 448.0, 2.0**-6)[None].repeat(COLUMNS, 1)
    elif kind == "any bytes":
        rows, columns = (torch.randint(0, 127, rows.shape, generator=generator, dtype=torch.uint8) for _ in range(2))
        rows = rows | torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.uint8) << 7
        return rows.view(E4M3), columns.view(E4M3).T
    else:
        assert kind == "like"
    return rows.to(E4M3), columns.T.to(E4M3)


KINDS = (
    *("dominating", "one dominating an instruction", "like", "alternating", "growing", "shrinking", "spread"),
    *("subnormal", "zeros", "any bytes"),
)
SUMS = [(LENGTH, interval) for interval in INTERVALS] + [(channels, None) for channels in CHANNELS]
"""Sums over the sequence, and those over channels that S and dP are."""


def share_of_bound(kind: str, length: int, interval: int | None) -> float:
    """Largest error of a sum over what `sum_bound` allows it."""
    a8, b8 = inputs(kind, length, interval or length)
    error = (fp8_matmul(a8, b8, interval).double() - a8.double() @ b8.double()).abs()
    allowed = sum_bound(length, interval) * (magnitude(a8).double() @ magnitude(b8).double())
    return float((error / allowed).max())


@pytest.mark.parametrize(("length", "interval"), SUMS)
class TestBound:
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_input_goes_beyond_it(self, kind, length, interval):
        assert share_of_bound(kind, length, interval) <= 1

    def test_some_input_comes_near(self, length, interval):
        assert max(share_of_bound(kind, length, interval) for kind in KINDS) >= 1 / 2


@pytest.mark.parametrize("interval", INTERVALS)
def test_like_terms_lose_no_more_than_their_mean_bias(interval):
    """Half of what is cut off, on average, and at least an eighth where accumulators grow by many binades."""
    a8, b8 = inputs("spread", LENGTH, LENGTH)
    exact = a8.double() @ b8.double()
    terms = a8.double()[:, None] * b8.double().T[None]
    spread = float(terms.unflatten(-1, (-1, WIDTH)).amax(-1).mean() / terms.mean())
    lost = float(((exact - fp8_matmul(a8, b8, interval)) / exact).mean())
    assert mean_bias(LENGTH, interval, spread) / 8 <= lost <= mean_bias(LENGTH, interval, spread)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("factor", [1.0, 8.0, 30.0])
def test_logits_are_off_by_less_than_their_tolerance(channels, factor):
    """Standard-normal q8 and k8, and a channel that outweighs the others."""
    generator = torch.Generator().manual_seed(channels)
    q, k = torch.randn(2, 128, channels, generator=generator) * 8
    q[:, 0] *= factor
    k[:, 0] *= factor
    q8, k8 = (x.clamp(-448, 448).to(E4M3) for x in (q, k))
    exact = q8.double() @ k8.double().T
    error = fp8_matmul(q8, k8.T, None).double() - exact
    assert float(error.square().mean().sqrt()) <= matrix_unit_error(channels) * float(exact.square().mean().sqrt())


def tilings() -> dict[str, Tiling]:
    """Of every row of the kernels' tables."""
    rows = {f"portable {key}": tiles for table in (TABLE, DEFAULTS) for key, tiles in table.items()}
    found = {name: portable_tiling(tiles) for name, tiles in (*rows.items(), ("interpreted", INTERPRETED))}
    if TRITON_INSTALLED:
        found |= {f"Hopper {dim}": tiling for dim, tiling in hopper_tilings().items()}
    return found


@pytest.mark.parametrize("name", tilings())
class TestKernels:
    """What shares an accumulator of the matrix unit is short enough."""

    def lengths(self, name: str) -> set[int]:
        tiling = tilings()[name]
        return {tiling.forward, tiling.query_gradient, tiling.key_gradient, tiling.value_gradient}

    def test_a_tile_loses_less_than_half_of_what_rounding_one_operand_may(self, name):
        """For every input: E4M3_STEP is the largest relative error of one normal operand."""
        assert all(sum_bound(length, None) <= E4M3_STEP / 2 for length in self.lengths(name))

    @pytest.mark.parametrize("kind", ["like", "spread"])
    def test_a_long_sum_of_like_terms_is_right(self, name, kind):
        for length in self.lengths(name):
            a8, b8 = inputs(kind, LENGTH, LENGTH)
            assert relative(fp8_matmul(a8, b8, length), a8.double() @ b8.double()) <= COHERENT_ERROR


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def dot_kernel(
        p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, INTERVAL: tl.constexpr, FRESH: tl.constexpr
    ):  # fmt: skip
        rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
        a = tl.load(p_a + rows[:, None] * K + inner[None, :])
        b = tl.load(p_b + columns[:, None] * K + inner[None, :])
        p_tile = p_c + rows[:, None] * N + columns[None, :]
        c = tl.zeros((M, N), tl.float32) if FRESH else tl.load(p_tile)
        tl.store(p_tile, tl.dot(a, b.T, c, max_num_imprecise_acc=INTERVAL))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
class TestAgainstTheUnit:
    """The model has the bits of one tile's product, as Triton makes it."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("length", [32, 64, 128, 256])
    def test_a_product_added_to_an_accumulator(self, kind, length):
        parts = [inputs(kind, length, length) for _ in range(64 // COLUMNS)]
        a8, b8 = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
        for scale in (0.0, 1.0, 2.0**10, 2.0**20):
            c = torch.randn(64, 64, generator=torch.Generator().manual_seed(length)) * scale
            assert torch.equal(self.dot(a8, b8, c, None, scale == 0), multiply_add(a8, b8, c))

    @pytest.mark.parametrize("interval", [32, 64, 128])
    def test_sums_that_the_compiler_promotes(self, interval):
        """`max_num_imprecise_acc`: an accumulator takes that many products, float32 their sum."""
        a8, b8 = inputs("spread", 256, 256)
        a8, b8 = a8.repeat(4, 1), b8.repeat(1, 4)
        assert torch.equal(self.dot(a8, b8, torch.zeros(64, 64), interval, True), fp8_matmul(a8, b8, interval))

    @staticmethod
    def dot(a8: Tensor, b8: Tensor, c: Tensor, interval: int | None, fresh: bool) -> Tensor:
        a, b, out = (x.cuda().contiguous() for x in (a8.view(torch.uint8), b8.T.contiguous().view(torch.uint8), c))
        dot_kernel[(1,)](a.view(E4M3), b.view(E4M3), out, 64, 64, a8.shape[1], interval, fresh)
        return out.cpu()
