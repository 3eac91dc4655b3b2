"""The reference attention against exact float64 attention, and against the data flow it must follow."""

import math

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, Visibility, reference
from hf_geoscale.scaling import E4M3, sqnr_db

from ..conftest import here
from ..tolerances import FLOAT32_ROUNDOFF, GRADIENT_ERROR, OUTPUT_ERROR, SQNR_FLOOR_DB
from .samples import draw, exact, relative, scales

CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "more keys": {"keys": 101},
    "more queries": {"rows": 97, "keys": 53},
    "prime length": {"rows": 131},
    "one token": {"rows": 1},
    "multi-head": {"kv_heads": 4},
    "multi-query": {"kv_heads": 1},
    "dim 16": {"dim": 16},
    "dim 80": {"dim": 80},
    "dim 96": {"dim": 96},
    "dim 256": {"dim": 256},
    "no hadamard": {"incoherent": False},
    "high precision": {"precision": "high"},
}


@pytest.mark.parametrize("case", CASES)
class TestAgainstExact:
    """Laws of every mode: output and gradients near exact attention, no overflow."""

    def run(self, case, dtype=torch.float32):
        options = dict(CASES[case])
        shape = {n: options.pop(n) for n in ("rows", "keys", "kv_heads", "dim") if n in options}
        q, k, v = draw(**shape, dtype=dtype)
        statistics = AttentionStatistics()
        out = fp8_attention(q, k, v, **scales(q, k, v), **options, statistics=statistics)
        mask = Visibility(q.shape[2], k.shape[2], options.get("causal", True), options.get("window"))
        truth = exact(q, k, v, mask.dense(q.device), q.shape[-1] ** -0.5)
        return (q, k, v), out, truth, statistics

    def test_forward(self, case):
        _, out, truth, statistics = self.run(case)
        assert relative(out, truth) < OUTPUT_ERROR
        assert float(sqnr_db(truth.detach(), out.detach())) > SQNR_FLOOR_DB
        assert statistics.overflows == 0

    def test_gradients(self, case):
        operands, out, truth, statistics = self.run(case)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        ours = torch.autograd.grad(out, operands, gradient)
        theirs = torch.autograd.grad(truth, operands, gradient.double())
        floor = max(float(g.norm()) for g in theirs) * OUTPUT_ERROR  # a single visible key has dQ = dK = 0
        for mine, expected in zip(ours, theirs, strict=True):
            assert float((mine - expected).norm()) < max(GRADIENT_ERROR * float(expected.norm()), floor)
        assert statistics.overflows == 0

    def test_bfloat16_in_bfloat16_out(self, case):
        operands, out, truth, _ = self.run(case, torch.bfloat16)
        assert out.dtype == torch.bfloat16
        assert relative(out, truth) < OUTPUT_ERROR
        grads = torch.autograd.grad(out.sum(), operands)
        assert {g.dtype for g in grads} == {torch.bfloat16}


def test_second_derivatives_are_refused():
    q, k, v = draw(rows=8)
    out = fp8_attention(q, k, v, **scales(q, k, v))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_high_precision_is_better():
    q, k, v = draw(rows=128)
    q, k = 4 * q.detach(), 4 * k.detach()  # logits of some size, so that the rounding of k matters
    truth = exact(q, k, v, Visibility(128, 128).dense(q.device), 0.125)
    errors = [relative(fp8_attention(q, k, v, **scales(q, k, v), precision=p), truth) for p in ("standard", "high")]
    assert errors[1] < 0.8 * errors[0]


def test_key_ranges_left_and_right_padding_and_packing():
    q, k, v = draw(rows=40)
    causal = torch.arange(40)[:, None] >= torch.arange(40)
    left = causal & (torch.arange(40) >= 7)
    packed = causal & (torch.arange(40)[:, None] // 15 == torch.arange(40) // 15)
    key_range = torch.zeros(2, 40, 2, dtype=torch.int32)
    for b, mask in enumerate((left, packed)):
        for i, row in enumerate(mask):
            seen = row.nonzero().flatten()
            key_range[b, i] = torch.tensor([int(seen[0]), int(seen[-1]) + 1]) if len(seen) else torch.tensor([5, 5])
    out = fp8_attention(q, k, v, **scales(q, k, v), key_range=key_range, causal=False)
    truth = exact(q, k, v, torch.stack([left, packed])[:, None], 0.125)
    assert relative(out, truth) < OUTPUT_ERROR
    assert torch.equal(out[0, :, :7], torch.zeros(4, 7, 64))  # rows that see no key
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(truth.square().sum(), (q, k, v))
    for mine, expected in zip(grads, theirs, strict=True):
        assert torch.isfinite(mine).all()
        assert relative(mine, expected) < GRADIENT_ERROR
    assert not grads[1][0, :, :7].any()  # padded keys get no gradient


def test_a_batch_of_empty_rows_is_zero_not_nan():
    q, k, v = draw(rows=5)
    out = fp8_attention(q, k, v, **scales(q, k, v), key_range=torch.zeros(2, 5, 2, dtype=torch.int64))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out.any()
    assert not any(g.any() for g in grads)


class TestRoundingPoints:
    """The data flow of docs/numerics.md, redone densely in a few lines, must give the same numbers."""

    def dense(self, q, k, v, s, grad):
        fp8 = lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float()  # noqa: E731
        q8, k8, v8 = (fp8(x * s[f"{n}_quant_scale"][:, None, None]) for x, n in ((q, "q"), (k, "k"), (v, "v")))
        k8, v8 = k8.repeat_interleave(2, 1), v8.repeat_interleave(2, 1)
        per = lambda n: (1 / s[f"{n}_quant_scale"]).repeat_interleave(4 // len(s[f"{n}_quant_scale"]))[:, None, None]  # noqa: E731
        logits = q8 @ k8.mT * per("q") * per("k") * 0.25
        logits = logits.masked_fill(torch.ones(48, 48).triu(1).bool(), -math.inf)
        p = (logits - logits.amax(-1, keepdim=True)).exp()
        total = p.sum(-1, keepdim=True)
        p8 = fp8(256 * p)
        out = p8 @ v8 * per("v") / 256 / total
        folded = grad / total
        do_scale = 448 / folded.abs().amax((2, 3), keepdim=True)
        do = fp8(folded * do_scale) / do_scale
        delta = (do * out).sum(-1, keepdim=True)
        ds = p * (do @ v8.mT * per("v") - delta)
        v_norm = v8.norm(dim=-1).amax(-1)[..., None, None] * per("v")
        row_bound = 2 * 1.125 * do.norm(dim=-1, keepdim=True) * v_norm
        norm = folded.norm(dim=-1).amax(-1)[..., None, None] * (1 + 2**-4) + 16**0.5 / 1024 / do_scale
        group_bound = 2 * 1.125 * norm * v_norm
        for_dq, for_dk = (fp8(ds * 448 / bound) * bound / 448 for bound in (row_bound, group_bound))
        group = lambda x: x.unflatten(1, (2, 2)).sum(2)  # noqa: E731
        dq = for_dq @ k8 * per("k") * 0.25
        return out, dq, group(for_dk.mT @ q8 * per("q") * 0.25), group(p8.mT @ do / 256)

    def test_forward_and_backward(self):
        q, k, v = draw(rows=48, dim=16)  # one group of rows
        s = scales(q, k, v)
        out = fp8_attention(q, k, v, **s, incoherent=False)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad(out, (q, k, v), grad)
        with torch.no_grad():
            expected = self.dense(q, k, v, s, grad)
        # exp2 against exp may flip a rounding of P̃ or dS here and there: far below one E4M3 step overall
        for mine, theirs in zip((out, *grads), expected, strict=True):
            assert relative(mine, theirs) < 0.05 * OUTPUT_ERROR

    def test_backward_recomputes_the_forward_bit_for_bit(self, monkeypatch):
        """P̃ is formed once in the forward and once in the backward, from the same operands: the same bits."""
        seen = []
        original = reference._probabilities
        monkeypatch.setattr(reference, "_probabilities", lambda *a: seen.append(original(*a)) or seen[-1])
        q, k, v = draw(rows=150)
        out = fp8_attention(30 * q, 30 * k, v, **scales(30 * q, 30 * k, v))  # |S| in the hundreds
        with torch.autocast(here().type, dtype=torch.bfloat16):
            out.sum().backward()
        assert len(seen) == 6
        for forward, backward in zip(seen[:3], seen[3:], strict=True):
            assert torch.equal(forward, backward)
            assert float(forward.amax()) == 1.0

    def test_autocast_changes_nothing(self):
        q, k, v = draw()
        plain = fp8_attention(q, k, v, **scales(q, k, v))
        with torch.autocast(here().type, dtype=torch.bfloat16):
            cast = fp8_attention(q, k, v, **scales(q, k, v))
        assert torch.equal(plain, cast)


class TestInvariance:
    def test_future_tokens_do_not_change_one_bit_of_the_past(self):
        q, k, v = (x.detach() for x in draw(rows=150))
        s = scales(q, k, v)
        before = fp8_attention(q, k, v, **s)
        generator = torch.Generator().manual_seed(1)
        for x in (q, k, v):
            x[:, :, 90:] = 0.9 * x[:, :, 90:].roll(1, -1) * torch.rand(1, generator=generator)
        after = fp8_attention(q, k, v, **s)
        assert torch.equal(before[:, :, :90], after[:, :, :90])
        assert not torch.equal(before[:, :, 90:], after[:, :, 90:])

    def test_batch_does_not_change_a_row(self):
        q, k, v = draw(batch=3, rows=70)
        s = scales(q, k, v)
        together = fp8_attention(q, k, v, **s)
        alone = fp8_attention(q[1:2], k[1:2], v[1:2], **s)
        assert relative(together[1:2], alone) < FLOAT32_ROUNDOFF

    def test_two_runs_give_the_same_bits(self):
        q, k, v = draw()
        runs = []
        for _ in range(2):
            out = fp8_attention(q, k, v, **scales(q, k, v))
            runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_strided_views_as_transformers_hands_them_over(self):
        q, k, v = (x.detach() for x in draw())
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert not views[0].is_contiguous()
        s = scales(q, k, v)
        assert torch.equal(fp8_attention(*views, **s), fp8_attention(q, k, v, **s))


class TestStatistics:
    def test_overflow_is_counted_forward(self):
        q, k, v = draw()
        statistics = AttentionStatistics()
        s = scales(q, k, v)
        s["q_quant_scale"] = s["q_quant_scale"] * 1000
        out = fp8_attention(q, k, v, **s, incoherent=False, statistics=statistics)
        expected = int(((q.abs() * s["q_quant_scale"][:, None, None]) > 448).sum())
        assert statistics.overflows == expected > 0
        assert float(statistics.range_used["q"].amax()) > 1
        assert torch.isfinite(out).all()

    @pytest.mark.parametrize("bound", [8.0, 1.0], ids=["norm", "entry"])
    def test_the_gradient_bound_does_not_rest_on_the_scale_of_v(self, bound):
        """Two opposite values of entries ±1, norm 8: |dS| reaches ‖dO′‖·8, within the bound by the measured norm of v8."""
        q, k = torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2, 64)
        v = torch.ones(1, 1, 2, 64)
        v[:, :, 1] = -1
        one, v_scale = torch.ones(1), torch.tensor([E4M3.max / bound])
        names = {"q_quant_scale": one, "k_quant_scale": one, "v_quant_scale": v_scale}
        statistics = AttentionStatistics()
        out = fp8_attention(q, k, v.requires_grad_(), **names, causal=False, statistics=statistics)
        torch.autograd.grad(out, v, torch.ones_like(out))
        assert statistics.overflows == 0

    def test_the_gradient_bound_is_sharp_enough_to_need_its_norms(self, monkeypatch):
        """With a quarter of the bound the same dS overflows: the bound is not slack by more than 4."""
        monkeypatch.setattr(reference, "LOGIT_GRADIENT_MARGIN", reference.LOGIT_GRADIENT_MARGIN / 4)
        q, k = torch.zeros(1, 1, 2, 64, requires_grad=True), torch.zeros(1, 1, 2, 64)
        v = torch.ones(1, 1, 2, 64)
        v[:, :, 1] = -1
        one = torch.ones(1)
        statistics = AttentionStatistics()
        names = {"q_quant_scale": one, "k_quant_scale": one, "v_quant_scale": torch.tensor([E4M3.max / 8])}
        out = fp8_attention(q, k, v, **names, causal=False, statistics=statistics)
        torch.autograd.grad(out, q, torch.ones_like(out))
        assert statistics.overflows > 0

    def test_observed_logits(self):
        q, k, v = draw(rows=80)
        statistics = AttentionStatistics(observe_logits=True)
        fp8_attention(q, k, v, **scales(q, k, v), statistics=statistics, window=20)
        logits = q @ k.repeat_interleave(2, 1).mT * 0.125
        truth = logits.masked_fill(~Visibility(80, 80, True, 20).dense(q.device), 0).abs().amax((0, 2, 3))
        torch.testing.assert_close(statistics.logit_amax, truth, rtol=0.05, atol=0)
        assert AttentionStatistics().logit_amax is None


def test_memory_is_linear_in_length():
    """What the forward keeps for the backward: FP8 operands, output and two numbers a row; no L×L tensor."""
    saved = {}
    for length in (256, 512):
        q, k, v = draw(batch=1, rows=length)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            fp8_attention(q, k, v, **scales(q, k, v))
        saved[length] = sum(sizes)
    heads = 4 * 64 + 2 * 2 * 64  # q8, k8, v8 bytes a token
    assert saved[512] - saved[256] == 256 * (heads + 4 * 64 * 4 + 2 * 4 * 4)


@pytest.mark.gpu
def test_gpu_matches_cpu():
    q, k, v = draw(rows=200)
    s = scales(q, k, v)
    out = fp8_attention(q, k, v, **s)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    gpu = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    out_gpu = fp8_attention(*gpu, **{n: x.cuda() for n, x in s.items()}, backend="reference")
    grads_gpu = torch.autograd.grad(out_gpu, gpu, torch.ones_like(out_gpu))
    for mine, theirs in zip((out_gpu, *grads_gpu), (out, *grads), strict=True):
        assert relative(mine.cpu(), theirs) < 0.05 * OUTPUT_ERROR
