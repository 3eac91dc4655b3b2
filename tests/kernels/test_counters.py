"""What calls count: sections of one buffer, and ranges that are divided when somebody reads them."""

import pytest
import torch
from torch import Tensor

from hf_geoscale.kernels import AttentionStatistics
from hf_geoscale.kernels.counters import ALIGNMENT, counters_of, empty_like_zeroed, v_norm_of, zeroed
from hf_geoscale.kernels.statistics import fold_ranges

CPU = torch.device("cpu")
COUNTS = (3, 1, 1)


def cast(seed: int, counts: tuple[int, int, int] = COUNTS) -> tuple[Tensor, Tensor]:
    """overflow and amax of one call, with the zeros behind them."""
    generator = torch.Generator().manual_seed(seed)
    amax = torch.cat([600 * torch.rand(sum(counts), generator=generator), torch.zeros(3)])
    return torch.randint(9, (4,), generator=generator), amax


class TestBuffer:
    @pytest.mark.parametrize("observe", [False, True], ids=["unobserved", "observed"])
    @pytest.mark.parametrize("count", [False, True], ids=["uncounted", "counted"])
    def test_sections_are_apart_aligned_and_as_long_as_needed(self, count, observe):
        for heads, kv_heads in ((1, 1), (3, 1), (14, 2), (32, 8)):
            shape = (5, heads, kv_heads, count, observe)
            buffer = zeroed(*shape, CPU)
            parts = counters_of(buffer, *shape)
            least = (4 * count, (heads + 2 * kv_heads) * count, heads * observe, 5 * kv_heads)
            assert all(len(part) >= n for part, n in zip(parts, least, strict=True))
            assert all(bool(len(part)) == bool(n) for part, n in zip(parts, least, strict=True))
            used = [part for part in parts if len(part)]
            assert all((part.data_ptr() - buffer.data_ptr()) % (4 * ALIGNMENT) == 0 for part in used)
            for part in used:  # each byte belongs to one
                part.add_(1)
            assert all(bool((part == 1).all()) for part in used)
            assert torch.equal(v_norm_of(buffer, 5, kv_heads), parts.v_norm)
            assert empty_like_zeroed(torch.ones(1), *shape).shape == buffer.shape


def test_what_one_call_counted_can_be_saved(tmp_path):
    shape = (5, *COUNTS[:2], True, True)
    counters = counters_of(zeroed(*shape, CPU), *shape)
    statistics = AttentionStatistics()
    statistics.add_casts(counters.overflow, counters.amax, COUNTS)
    torch.save(statistics, tmp_path / "statistics.pt")
    assert torch.load(tmp_path / "statistics.pt", weights_only=False).overflows == 0


class TestRanges:
    def test_are_those_of_dividing_each_call(self):
        statistics = AttentionStatistics()
        for seed in range(3):
            statistics.add_casts(*cast(seed), COUNTS)
        shares = [cast(seed)[1] / 448 for seed in range(3)]
        expected = torch.stack(shares).amax(0).split([*COUNTS, 3])[:3]
        assert all(torch.equal(statistics.range_used[x], y) for x, y in zip("qkv", expected, strict=True))
        assert all(
            torch.equal(statistics.latest[x], y) for x, y in zip("qkv", shares[2].split([*COUNTS, 3]), strict=False)
        )
        assert list(statistics.overflows_by_operand.values()) == sum(cast(seed)[0] for seed in range(3)).tolist()

    def test_set_anew_forget_what_was_not_read(self):
        statistics = AttentionStatistics()
        statistics.add_casts(*cast(0), COUNTS)
        statistics.range_used = {}
        assert statistics.range_used == {}
        assert set(statistics.latest) == {"q", "k", "v"}

    def test_of_many_are_folded_together(self):
        together, alone = ([AttentionStatistics() for _ in range(3)] for _ in range(2))
        for group in (together, alone):
            for seed, statistics in enumerate(group[:2]):  # the third saw no call
                statistics.add_casts(*cast(seed), COUNTS)
                statistics.add_range("q", torch.full((3,), 0.5))
        fold_ranges(together)
        assert all(statistics._amax is None for statistics in together)
        for mine, theirs in zip(together, alone, strict=True):
            assert {k: v.tolist() for k, v in mine.range_used.items()} == {
                k: v.tolist() for k, v in theirs.range_used.items()
            }
