"""The Triton kernels against the reference, feature by feature: on a GPU, or in Triton's interpreter at the same small sizes."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics
from hf_geoscale.kernels.backend import triton_missing

from ..tolerances import FUSED_LOGITS
from .fused_cases import CASES, DEVICE, NEEDS_KERNELS, agree, operands, run

pytestmark = NEEDS_KERNELS
if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import fused, passes


@functools.cache
def plain_run(case: str) -> list[Tensor]:
    return run(*operands(CASES[case]))


@pytest.mark.parametrize("case", CASES)
class TestAgainstReference:
    """Laws of every feature."""

    def test_output_and_gradients(self, case):
        assert agree(plain_run(case), run(*operands(CASES[case]), "reference"))


LONG_CASES = {
    "causal": {"rows": 1100},
    "full": {"rows": 900, "keys": 1100, "causal": False},
    "window": {"rows": 1100, "window": 300},
    "more keys": {"rows": 500, "keys": 1300},
    "more queries": {"rows": 1300, "keys": 500},
    "two groups": {"rows": 2100, "heads": 4, "kv_heads": 2},
    "padding": {"rows": 1100, "ranges": "padding"},
    "packed": {"rows": 700, "ranges": "packed"},
}
"""Several blocks of rows and keys, and more tiles than a ring holds."""


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: too long for the interpreter")
class TestManyTiles:
    @pytest.mark.parametrize("dim", [64, 80, 128])
    @pytest.mark.parametrize("case", LONG_CASES)
    def test_output_and_gradients(self, case, dim):
        leaves, options = operands({**LONG_CASES[case], "dim": dim})
        assert agree(run(leaves, options), run(leaves, options, "reference"))


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU, which has kernels of its own",
)
@pytest.mark.parametrize("case", CASES)
class TestPortableKernelsOnHopper:
    def test_output_and_gradients(self, case, monkeypatch):
        monkeypatch.setattr(passes.hopper, "launches_for", lambda *_, **__: None)
        leaves, options = operands(CASES[case])
        assert agree(run(leaves, options), run(leaves, options, "reference"))


def test_quantised_logits_are_counted_before_they_saturate():
    leaves, options = operands(CASES["quantised logits that overflow"])
    mine, theirs = AttentionStatistics(), AttentionStatistics()
    run(leaves, {**options, "statistics": mine})
    run(leaves, {**options, "statistics": theirs}, "reference")
    counts = theirs.overflows_by_operand
    assert counts.pop("logit gradient") == 0
    assert counts["logit"] > 100
    assert mine.overflows_by_operand == pytest.approx(
        counts, rel=2e-2
    )  # a few logits lie within round-off of the limit
    torch.testing.assert_close(mine.range_used["logit"], theirs.range_used["logit"], rtol=1e-2, atol=0)
    once = mine.overflows_by_operand["logit"]
    run(leaves, {**options, "statistics": mine})
    assert mine.overflows_by_operand["logit"] == 2 * once


@pytest.mark.parametrize("case", ["causal", "window", "padding", "high precision", "dropout", "dim 80"])
class TestStatistics:
    def test_ranges_overflows_and_logits(self, case):
        leaves, options = operands(CASES[case])
        mine, theirs = AttentionStatistics(observe_logits=True), AttentionStatistics(observe_logits=True)
        run(leaves, {**options, "statistics": mine})
        run(leaves, {**options, "statistics": theirs}, "reference")
        assert mine.overflows == theirs.overflows == 0
        for name in "qkv":
            torch.testing.assert_close(mine.range_used[name], theirs.range_used[name], rtol=1e-2, atol=0)
        torch.testing.assert_close(mine.logit_amax, theirs.logit_amax, rtol=FUSED_LOGITS, atol=0)


def poison(monkeypatch) -> None:
    """Fill every buffer the launches allocate with NaN."""

    def poisoned(make):
        def call(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.element_size() == 1:
                return x.view(torch.uint8).fill_(0x7F).view(x.dtype)
            return x.fill_(float("nan") if x.is_floating_point() else 2**30)

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(fused.torch, name, poisoned(getattr(torch, name)))


class TestBits:
    @pytest.mark.parametrize("case", ["causal", "more keys", "padding", "dim 80", "dropout", "high precision"])
    def test_two_runs_on_poisoned_memory_give_the_same_bits(self, case, monkeypatch):
        first = plain_run(case)
        leaves, options = operands(CASES[case])
        with monkeypatch.context() as patch:
            poison(patch)
            second = run(leaves, options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.isfinite(x).all() for x in first)

    @pytest.mark.parametrize("options", [{}, {"window": 40}, {"precision": "high"}], ids=str)
    def test_future_tokens_do_not_change_one_bit_of_the_past(self, options):
        leaves, options = operands({"rows": 150, **options})
        before = fp8_attention(*leaves, **options, backend="triton")
        with torch.no_grad():
            for x in leaves:
                x[:, :, 77:] *= -3
        after = fp8_attention(*leaves, **options, backend="triton")
        assert torch.equal(before[:, :, :77], after[:, :, :77])
        assert not torch.equal(before, after)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_changes_no_bit(self, reentrant):
        """Dropout's seed comes from torch's generator, which a checkpoint restores."""
        leaves, options = operands({"dropout_p": 0.2})

        def attend(*operands):
            return fp8_attention(*operands, **options, backend="triton")

        results = []
        for wrap in (lambda *x: attend(*x), lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
            torch.manual_seed(9)
            for x in leaves:
                x.grad = None
            wrap(*leaves).square().sum().backward()
            results.append([x.grad for x in leaves])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
