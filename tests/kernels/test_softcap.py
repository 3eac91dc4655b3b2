"""Soft-capped logits, softcap·tanh(S/softcap): against exact attention, fused against the reference, and what they leave alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, Visibility
from hf_geoscale.kernels.backend import TRITON_INSTALLED, triton_missing
from hf_geoscale.kernels.philox import dropout_keep
from hf_geoscale.scaling import E4M3

from ..tolerances import FLOAT32_ROUNDOFF, FUSED_LOGITS, OUTPUT_ERROR
from .fused_cases import DEVICE, NEEDS_KERNELS, agree, operands, ranges, run
from .samples import assert_near_exact, draw, relative, scales

if triton_missing(DEVICE) is None:
    import triton
    import triton.language as tl

    from hf_geoscale.kernels.forward import cap_logits

    @triton.jit
    def _tanh_kernel(p_x, p_y, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(p_y + at, cap_logits(tl.load(p_x + at), 0.5))


pytestmark = pytest.mark.feature("soft cap")
CAP = 0.7
"""Far into the bend: of standard-normal q and k, logits have a standard deviation of 1."""


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,  # (B or 1, 1, Lq, Lk)
    softcap: float | None = CAP,
    keep: Tensor | float = 1.0,  # 1 / (1 − p) where a probability survives dropout, 0 where not
) -> Tensor:
    """Dense attention in float64, written out; rows that see nothing give 0."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    weights = torch.nan_to_num(logits.masked_fill(~visible, -math.inf).softmax(-1)) * keep
    return weights @ v.repeat_interleave(groups, 1)


CASES = {
    "causal": {},
    "full": {"causal": False},
    "multi-query": {"kv_heads": 1},
    "window": {"window": 9},
    "more keys": {"keys": 101},
    "dim 80, no hadamard": {"dim": 80, "incoherent": False},
    "high precision": {"precision": "high"},
    "padding": {"ranges": "padding"},
    "packed": {"ranges": "packed"},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 2**40 + 7},
}


@pytest.mark.parametrize("softcap", [CAP, 50.0], ids=["bent", "Gemma 2's"])
@pytest.mark.parametrize("case", CASES)
def test_reference_against_exact_attention(case, softcap):
    options = dict(CASES[case])
    shape = {n: options.pop(n) for n in ("keys", "kv_heads", "dim") if n in options}
    kind = options.pop("ranges", None)
    q, k, v = draw(**shape)
    key_range = None if kind is None else ranges(kind, 70)
    statistics = AttentionStatistics()
    given = scales(q, k, v) | {"softcap": softcap, "key_range": key_range, "statistics": statistics}
    out = fp8_attention(q, k, v, **given, **options)
    mask = Visibility(70, k.shape[2], options.get("causal", True), options.get("window"), key_range)
    keep = 1.0
    if p := options.get("dropout_p"):
        rows = torch.arange(70)
        keep = dropout_keep(options["dropout_seed"], p, 8, rows, rows).view(2, 4, 70, 70) / (1 - p)
    truth = exact(q, k, v, mask.dense(q.device), softcap, keep)
    assert_near_exact(out, truth, [q, k, v], seed=9)
    assert statistics.overflows == 0  # the bound of dS holds


def test_the_exact_attention_of_these_tests_differs_with_and_without_a_cap():
    """Or the tests above could not fail."""
    q, k, v = draw()
    visible = Visibility(70, 70).dense(q.device)
    assert relative(exact(q, k, v, visible), exact(q, k, v, visible, None)) > 2 * OUTPUT_ERROR


def test_saturated_logits_are_the_cap_and_have_no_gradient():
    """Every q·k is ±4096: the log-sum-exp of a lone key is ±cap, dQ and dK vanish, and dV does not."""
    q, k, v = draw(rows=40)
    q, k = ((x.detach()[..., :1].sign() * 8).expand_as(x).contiguous().requires_grad_() for x in (q, k))
    given = scales(q, k, v) | {"softcap": 30.0}
    _, lse = fp8_attention(q, k, v, **given, window=1, return_lse=True)
    sign = (q * k.repeat_interleave(2, 1)).sum(-1).sign()
    torch.testing.assert_close(lse, 30 * sign, rtol=FLOAT32_ROUNDOFF, atol=0)
    dq, dk, dv = torch.autograd.grad(fp8_attention(q, k, v, **given).square().sum(), (q, k, v))
    assert not dq.any()
    assert not dk.any()
    assert dv.any()


def test_a_wide_cap_is_no_cap():
    """S³/(3·cap²) is what a cap takes off: 10⁻⁸ at 10⁴. Larger caps must not lose the logits' own digits either."""
    q, k, v = draw()
    given = scales(q, k, v)
    _, plain = fp8_attention(q, k, v, **given, return_lse=True)
    for softcap in (1e4, 2.0**20):
        _, capped = fp8_attention(q, k, v, **given, return_lse=True, softcap=softcap)
        torch.testing.assert_close(capped, plain, rtol=FLOAT32_ROUNDOFF, atol=FLOAT32_ROUNDOFF)


class TestStatistics:
    def test_observed_logits_are_those_before_the_cap(self):
        q, k, v = draw()
        seen = []
        for softcap in (None, CAP):
            statistics = AttentionStatistics(observe_logits=True)
            fp8_attention(q, k, v, **scales(q, k, v), softcap=softcap, statistics=statistics)
            seen.append(statistics.logit_amax)
        assert torch.equal(*seen)
        assert float(seen[0].amin()) > 3 * CAP

    def test_quantised_logits_are_the_capped_ones_and_the_cap_bounds_them(self):
        """448 / cap is a scale that no logit exceeds, and with a window of one key the log-sum-exp is the rounded logit."""
        q, k, v = draw()
        given = scales(q, k, v) | {"softcap": CAP, "window": 1, "return_lse": True}
        quant_scale = torch.full((4,), (1 - 2.0**-20) * E4M3.max / CAP)
        _, capped = fp8_attention(q, k, v, **given)
        statistics = AttentionStatistics()
        _, rounded = fp8_attention(q, k, v, **given, logit_quant_scale=quant_scale, statistics=statistics)
        scale = quant_scale[:, None]
        expected = (capped * scale).to(torch.float8_e4m3fn).float() / scale
        torch.testing.assert_close(rounded, expected, rtol=FLOAT32_ROUNDOFF, atol=1e-6)
        assert statistics.overflows == 0
        assert 0.9 < float(statistics.range_used["logit"].amax()) <= 1


@pytest.mark.parametrize("softcap", [0.0, -50.0, math.nan, math.inf, 2.0**21, 2.0**-21])
def test_bad_caps_are_named(softcap):
    q, k, v = draw(rows=4)
    with pytest.raises(ValueError, match=rf"softcap must lie in .*None for no soft cap, got {softcap}"):
        fp8_attention(q, k, v, **scales(q, k, v), softcap=softcap)


FUSED_CASES = {
    "causal": {"batch": 2, "rows": 131},
    "full, multi-query": {"heads": 4, "causal": False},
    "window": {"rows": 150, "window": 50},
    "more keys, dim 80": {"rows": 40, "keys": 131, "dim": 80},
    "two groups, dim 128": {"heads": 4, "kv_heads": 2, "dim": 128},
    "dim 256": {"dim": 256},
    "padding": {"ranges": "padding", "rows": 131},
    "dropout, high precision, packed": {"dropout_p": 0.1, "dropout_seed": 3, "precision": "high", "ranges": "packed"},
    "Gemma 2's cap": {"softcap": 50.0},
    "quantised logits, window": {"logit_bound": CAP, "rows": 150, "window": 50},
    "quantised logits that overflow": {"logit_bound": CAP / 2},
}


class TestFused:
    pytestmark = NEEDS_KERNELS

    @pytest.mark.parametrize("case", FUSED_CASES)
    def test_output_and_gradients_against_the_reference(self, case):
        leaves, options = operands({"softcap": CAP, **FUSED_CASES[case]})
        mine = run(leaves, options)
        assert agree(mine, run(leaves, options, "reference"))
        if options["softcap"] == CAP:  # which the comparison must see; Gemma 2's does nothing to logits of 1
            assert not agree(mine, run(leaves, options | {"softcap": None}, "reference"))

    def test_two_runs_give_the_same_bits(self):
        leaves, options = operands({"softcap": CAP, "rows": 131})
        first, second = run(leaves, options), run(leaves, options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_tanh_is_accurate_wherever_it_is_asked(self):
        """Both branches and their seam, tiny and huge values, infinities."""
        powers = torch.logspace(-30, 30, 400, dtype=torch.float64)
        special = torch.tensor([0.0, 1e38, math.inf, 0.5 - 1e-7, 0.5, 0.5 + 1e-7], dtype=torch.float64)
        x = torch.cat([powers, torch.linspace(0, 20, 106, dtype=torch.float64), special]).float()
        x = torch.cat([x, -x]).to(DEVICE)
        y = torch.empty_like(x)
        _tanh_kernel[(1,)](x, y, len(x))
        expected = (x.double() * 0.5).tanh()
        assert float((y.abs() - 1).amax()) <= 0
        torch.testing.assert_close(y.double(), expected, rtol=2.0**-19, atol=0)

    def test_statistics(self):
        leaves, options = operands({"softcap": CAP, "logit_bound": CAP / 2})
        mine, theirs = AttentionStatistics(observe_logits=True), AttentionStatistics(observe_logits=True)
        run(leaves, {**options, "statistics": mine})
        run(leaves, {**options, "statistics": theirs}, "reference")
        torch.testing.assert_close(mine.logit_amax, theirs.logit_amax, rtol=FUSED_LOGITS, atol=0)
        torch.testing.assert_close(mine.range_used["logit"], theirs.range_used["logit"], rtol=FUSED_LOGITS, atol=0)
        counts = theirs.overflows_by_operand
        assert mine.overflows_by_operand == pytest.approx(counts, rel=2e-2)
        assert counts["logit"] > 100
        assert counts["logit gradient"] == 0

    def test_a_compiled_graph_carries_the_cap(self):
        leaves, options = operands({"softcap": CAP})
        torch._dynamo.reset()
        attend = torch.compile(
            lambda *x: fp8_attention(*x, **options, backend="triton"), fullgraph=True, backend="aot_eager"
        )
        out = attend(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        compiled = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, options), compiled, strict=True))


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_the_hopper_kernels_leave_soft_caps_to_the_portable_ones(monkeypatch):
    from hf_geoscale.kernels import hopper
    from hf_geoscale.kernels.launch import Call

    launches = SimpleNamespace()
    monkeypatch.setattr(hopper, "launch", launches)
    monkeypatch.setattr(hopper, "runs", lambda *_: True)
    one = torch.ones(1)
    given = (one, one, one, None, None, 0.125, True, 0, 0.0, False, 64, None, 0)
    assert hopper.launches_for(Call(*given), DEVICE, counters=False) is launches
    assert hopper.launches_for(Call(*given, softcap=50.0), DEVICE, counters=False) is None
