"""What calls count: sections of one buffer, and ranges that are divided when somebody reads them."""

import copy

import pytest
import torch
from torch import Tensor

from hf_geoscale.kernels import AttentionStatistics
from hf_geoscale.kernels.counters import (
    ALIGNMENT,
    amax_of,
    counters_of,
    empty_like_zeroed,
    overflow_of,
    v_norm_of,
    zeroed,
)
from hf_geoscale.kernels.shared_counters import start_over
from hf_geoscale.kernels.statistics import CASTS_KEPT, fold_ranges

CPU = torch.device("cpu")
COUNTS = (3, 1, 1)


def cast(seed: int) -> Tensor:
    """The buffer of one call."""
    generator = torch.Generator().manual_seed(seed)
    buffer = zeroed(1, *COUNTS[:2], True, False, CPU)
    overflow, amax, _, _ = counters_of(buffer, 1, *COUNTS[:2], True, False)
    overflow.copy_(torch.randint(9, (4,), generator=generator))
    amax[: sum(COUNTS)] = 600 * torch.rand(sum(COUNTS), generator=generator)
    return buffer


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
    statistics = AttentionStatistics()
    statistics.add_casts(zeroed(5, *COUNTS[:2], True, True, CPU), COUNTS)
    assert statistics.overflows == 0
    torch.save(statistics, tmp_path / "statistics.pt")
    assert torch.load(tmp_path / "statistics.pt", weights_only=False).overflows == 0


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_sections_have_their_types_whatever_the_default(bfloat16_by_default):
    shape = (5, *COUNTS[:2], True, True)
    counters = counters_of(zeroed(*shape, CPU), *shape)
    assert [part.dtype for part in counters] == [torch.int64, *[torch.float32] * 3]
    assert len(counters.overflow) == 4


class TestRanges:
    @pytest.mark.parametrize("kept", [1, 2, 32])
    def test_are_those_of_dividing_each_call(self, kept, monkeypatch):
        monkeypatch.setattr("hf_geoscale.kernels.statistics.CASTS_KEPT", kept)
        statistics = AttentionStatistics()
        for seed in range(3):
            statistics.add_casts(cast(seed), COUNTS)
        shares = [amax_of(cast(seed), COUNTS) / 448 for seed in range(3)]
        expected = torch.stack(shares).amax(0).split(COUNTS)
        assert all(torch.equal(statistics.range_used[x], y) for x, y in zip("qkv", expected, strict=True))
        assert all(torch.equal(statistics.latest[x], y) for x, y in zip("qkv", shares[2].split(COUNTS), strict=True))
        counted = sum(overflow_of(cast(seed)) for seed in range(3)).tolist()
        for _ in range(2):  # reading adds nothing
            assert list(statistics.overflows_by_operand.values()) == counted

    def test_set_anew_forget_what_was_not_read(self):
        statistics = AttentionStatistics()
        statistics.add_casts(cast(0), COUNTS)
        statistics.range_used = {}
        assert statistics.range_used == {}
        assert set(statistics.latest) == {"q", "k", "v"}
        assert statistics.overflows == int(overflow_of(cast(0)).sum())

    def test_read_in_between_miss_and_repeat_no_call(self):
        statistics, whole = AttentionStatistics(), AttentionStatistics()
        for seed in range(5):
            statistics.add_casts(cast(seed), COUNTS)
            whole.add_casts(cast(seed), COUNTS)
            if seed == 1:
                assert statistics.range_used["q"].tolist() == whole.range_used["q"].tolist()
                statistics.range_used = {}
            if seed == 2:
                assert statistics.overflows > 0
        later = AttentionStatistics()
        for seed in range(2, 5):
            later.add_casts(cast(seed), COUNTS)
        assert {k: v.tolist() for k, v in statistics.range_used.items()} == {
            k: v.tolist() for k, v in later.range_used.items()
        }
        assert statistics.overflows_by_operand == whole.overflows_by_operand

    def test_of_other_head_counts_are_never_mixed(self):
        statistics, counts = AttentionStatistics(), [(3, 1, 1), (2, 2, 2)]
        buffers = [zeroed(5, *c[:2], True, True, CPU) for c in counts]
        for buffer, c in zip(buffers, counts, strict=True):
            statistics.add_casts(buffer, c)
        assert statistics.overflows == 0
        with pytest.raises(RuntimeError, match="must match the size"):
            _ = statistics.range_used

    def test_latest_is_of_the_last_call_whoever_made_it(self):
        statistics = AttentionStatistics()
        statistics.add_casts(cast(0), COUNTS)
        statistics.add_range("q", torch.full((3,), 0.25))
        assert statistics.latest["q"].tolist() == [0.25] * 3

    def test_many_calls_keep_few_buffers(self):
        statistics = AttentionStatistics()
        for seed in range(3 * CASTS_KEPT):
            statistics.add_casts(cast(seed), COUNTS)
            assert len(statistics._casts) < CASTS_KEPT

    def test_of_many_are_folded_together(self):
        together, alone = ([AttentionStatistics() for _ in range(3)] for _ in range(2))
        for group in (together, alone):
            for seed, statistics in enumerate(group[:2]):  # the third saw no call
                statistics.add_casts(cast(seed), COUNTS)
                statistics.add_range("q", torch.full((3,), 0.5))
        fold_ranges(together)
        assert all(statistics._amax is None for statistics in together)
        for mine, theirs in zip(together, alone, strict=True):
            assert {k: v.tolist() for k, v in mine.range_used.items()} == {
                k: v.tolist() for k, v in theirs.range_used.items()
            }


def shares(*seeds: int) -> list[list[float]]:
    """Largest shares of the range of these calls, by operand."""
    return [x.tolist() for x in (torch.stack([amax_of(cast(s), COUNTS) for s in seeds]).amax(0) / 448).split(COUNTS)]


def overflows(*seeds: int) -> list[int]:
    return sum(overflow_of(cast(s)) for s in seeds).tolist()


def taken(statistics: AttentionStatistics) -> list[list[float]]:
    return [x.tolist() for x in statistics.take_earlier().values()]


class TestStartOver:
    """Two layers; calls of layer i in round r have the seed 10·r + i."""

    def group(self) -> list[AttentionStatistics]:
        return [AttentionStatistics() for _ in range(2)]

    def call(self, group, turn: int) -> None:
        for i, statistics in enumerate(group):
            statistics.add_casts(cast(10 * turn + i), COUNTS)

    def test_ranges_are_of_later_calls_and_totals_of_all(self):
        group = self.group()
        for turn in range(3):
            self.call(group, turn)
            start_over(group)
            assert all(s.range_used == s.latest == {} for s in group)
        self.call(group, 3)
        for i, s in enumerate(group):
            assert [x.tolist() for x in s.range_used.values()] == shares(30 + i)
            assert taken(s) == shares(i, 10 + i, 20 + i)
            assert taken(s) == []
            assert list(s.overflows_by_operand.values()) == overflows(i, 10 + i, 20 + i, 30 + i)
        start_over(group)
        assert [taken(s) for s in group] == [shares(30), shares(31)]
        for s in group:
            s.add_casts(torch.zeros_like(cast(0)), COUNTS)
        start_over(group)
        assert all(not any(map(any, taken(s))) for s in group)

    def test_the_next_call_finds_zeros_and_only_that(self):
        group = self.group()
        self.call(group, 0)
        length = len(cast(0))
        assert group[0].buffer(length, CPU) is None
        start_over(group)
        first, second = (s.buffer(length, CPU) for s in group)
        assert first.shape == second.shape == cast(0).shape
        assert not first.any()
        assert second.data_ptr() - first.data_ptr() >= 4 * length
        assert (first.data_ptr() - second.data_ptr()) % (4 * ALIGNMENT) == 0
        assert group[0].buffer(length, CPU) is None
        self.call(group, 1)
        start_over(group)
        assert group[0].buffer(length + 4, CPU) is None

    def test_several_calls_of_each_are_counted_together(self):
        group = self.group()
        for turn in range(4):
            self.call(group, turn)
        start_over(group)
        assert group[0].buffer(len(cast(0)), CPU) is not None
        assert [taken(s) for s in group] == [shares(0, 10, 20, 30), shares(1, 11, 21, 31)]
        assert list(group[1].overflows_by_operand.values()) == overflows(1, 11, 21, 31)

    def test_layers_that_saw_another_number_of_calls_are_counted_alone(self):
        group = self.group()
        self.call(group, 0)
        start_over(group)
        self.call(group, 1)
        group[0].add_casts(cast(20), COUNTS)
        start_over(group)
        assert [s.buffer(len(cast(0)), CPU) for s in group] == [None, None]
        self.call(group, 3)
        start_over(group[::-1])
        assert [taken(s) for s in group] == [shares(0, 10, 20, 30), shares(1, 11, 31)]
        assert list(group[0].overflows_by_operand.values()) == overflows(0, 10, 20, 30)
        start_over(group)  # without a call
        assert [taken(s) for s in group] == [[], []]

    def test_layers_may_leave_a_group(self):
        group = self.group()
        self.call(group, 0)
        start_over(group)
        self.call(group[1:], 1)
        start_over(group[1:])
        assert taken(group[1]) == [x.tolist() for x in _maximum(cast(1), cast(10))]
        assert list(group[1].overflows_by_operand.values()) == overflows(1, 10)
        assert taken(group[0]) == shares(0)

    @pytest.mark.parametrize("left", [1, 2])
    def test_the_first_layers_may_be_all_that_start_over(self, left):
        group = [AttentionStatistics() for _ in range(3)]
        self.call(group, 0)
        start_over(group)
        self.call(group[:left], 1)
        start_over(group[:left])
        self.call(group, 2)
        start_over(group)
        for i, s in enumerate(group):
            turns = (0, 10, 20) if i < left else (0, 20)
            seeds = [turn + i for turn in turns]
            assert taken(s) == shares(*seeds)
            assert list(s.overflows_by_operand.values()) == overflows(*seeds)

    def test_zeros_from_another_stream_are_not_counted_into(self, monkeypatch):
        """Nothing orders their clearing before a launch on this one."""
        group = self.group()
        self.call(group, 0)
        start_over(group)
        assert group[0].buffer(len(cast(0)), CPU) is not None
        monkeypatch.setattr("hf_geoscale.kernels.statistics.stream_of", lambda device: 7)
        assert group[1].buffer(len(cast(0)), CPU) is None

    def test_counts_from_another_device_begin_anew(self):
        group = self.group()
        self.call(group, 0)
        start_over(group)
        earlier = group[0].earlier
        earlier.overflow = earlier.overflow.to("meta")  # as if the layers had been there
        assert not earlier.has_rows_of(group, COUNTS, CPU)
        assert earlier.has_rows_of(group, COUNTS, torch.device("meta"))

    def test_a_reading_before_does_not_keep_calls_from_being_counted_together(self):
        group = self.group()
        self.call(group, 0)
        assert group[0].range_used
        start_over(group)
        assert group[0].latest == {}
        self.call(group, 1)
        start_over(group)
        assert group[0].buffer(len(cast(0)), CPU) is not None
        assert [taken(s) for s in group] == [shares(0, 10), shares(1, 11)]
        assert list(group[0].overflows_by_operand.values()) == overflows(0, 10)

    def test_a_copy_counts_for_itself(self):
        group = self.group()
        self.call(group, 0)
        start_over(group)
        other = copy.deepcopy(group)
        self.call(group, 1)
        start_over(group)
        assert [taken(s) for s in other] == [shares(0), shares(1)]
        assert list(other[0].overflows_by_operand.values()) == overflows(0)


def _maximum(*buffers: Tensor) -> tuple[Tensor, ...]:
    return (torch.stack([amax_of(b, COUNTS) for b in buffers]).amax(0) / 448).split(COUNTS)
