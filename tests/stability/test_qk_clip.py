"""Factors of QK-Clip."""

import math

import torch

from hf_geoscale.stability import clip_factors

from ..tolerances import FLOAT64_ROUNDOFF


class TestClipFactors:
    def test_bring_each_head_to_the_threshold_and_leave_the_others(self):
        amax = torch.tensor([50.0, 400.0, 100.0, 20.0, 150.0, 600.0])
        query, key = clip_factors(amax, 100.0, 3)
        after = amax.double() * query * key.repeat_interleave(2)
        torch.testing.assert_close(after, amax.double().clamp(max=100.0), rtol=FLOAT64_ROUNDOFF, atol=0)
        assert query[2] == query[3] == key[1] == 1.0

    def test_share_the_root_where_heads_are_not_grouped(self):
        query, key = clip_factors(torch.tensor([400.0, 10.0]), 100.0, 2)
        assert query.tolist() == key.tolist() == [0.5, 1.0]

    def test_leave_heads_that_diverged(self):
        query, key = clip_factors(torch.tensor([math.nan, math.inf]), 100.0, 2)
        assert query.tolist() == key.tolist() == [1.0, 1.0]

    def test_of_a_diverged_head_keep_its_logits_where_its_group_is_clipped(self):
        query, key = clip_factors(torch.tensor([math.nan, 400.0]), 100.0, 1)
        assert key.tolist() == [0.5]
        assert query.tolist() == [2.0, 0.5]
