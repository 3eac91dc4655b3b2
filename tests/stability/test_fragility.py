"""Fragility of one attention call and one norm layer against dense linear algebra in float64, whole matrices."""

from dataclasses import replace

import pytest
import torch

from hf_geoscale.stability import AttentionCall, attention_fragility, norm_magnitude
from hf_geoscale.stability import fragility as module
from hf_geoscale.stability.fragility import POWER_ROUNDS, jacobian_norm, row_strata, sampled_rows, softmax_norms

from ..tolerances import FRAGILITY_FLOAT32

BATCH, HEADS, KV_HEADS, LENGTH, DIM, SCALE = 2, 4, 2, 37, 8, 8**-0.5
SIGMA_LOOSENESS = DIM ** (1 / 256)
"""Largest factor of `geometry.sigma_upper` over σ."""


def call(seed: int = 0, length: int = LENGTH, **options) -> AttentionCall:
    torch.manual_seed(seed)
    q = 2 * torch.randn(BATCH, HEADS, length, DIM)
    k, v = torch.randn(BATCH, KV_HEADS, length, DIM), torch.randn(BATCH, KV_HEADS, length, DIM)
    return AttentionCall(q, k, v, SCALE, **options)


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x.double().repeat_interleave(HEADS // KV_HEADS, dim=1)


def dense(of: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """S (0 where hidden) and P, causal, (B, H, L, L) float64."""
    logits = of.query.double() @ repeated(of.key).mT * SCALE
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, 0), logits.masked_fill(hidden, -torch.inf).softmax(-1)


def jacobians(p: torch.Tensor) -> torch.Tensor:
    """diag(p) − p pᵀ, (..., L, L)."""
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def test_the_aistats_quantities_are_those_of_dense_algebra():
    of = call()
    found = attention_fragility(of, v1=False)
    scores, p = dense(of)
    rows = sampled_rows(LENGTH)
    assert len(set(rows)) == 16
    start = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0)).double()
    image = start / start.norm()
    jacobian = jacobians(p[:, :, rows])
    for _ in range(POWER_ROUNDS - 1):
        image = (jacobian @ image[..., None])[..., 0]
        image = image / image.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    d_smx = (jacobian @ image[..., None])[..., 0].norm(dim=-1).amax()
    kappa = scores.norm() / p.norm() * d_smx
    chi = of.query.double().norm() * repeated(of.key).norm() / (p.norm() * DIM**0.5) * d_smx
    sigma = torch.linalg.matrix_norm(of.value.double(), ord=2).amax()
    entropy = -torch.special.xlogy(p, p).sum(-1).mean()
    exact = {"d_smx": d_smx, "kappa_softmax": kappa, "chi_score": chi, "entropy": entropy}
    exact |= {"score_norm": scores.norm(), "probability_norm": p.norm()}
    for name, value in exact.items():
        assert float(found[name]) == pytest.approx(float(value), rel=FRAGILITY_FLOAT32), name
    assert 1 - FRAGILITY_FLOAT32 < float(found["value_sigma"] / sigma) < SIGMA_LOOSENESS * (1 + FRAGILITY_FLOAT32)
    magnitude = (kappa + chi) * p.norm() * found["value_sigma"]
    assert float(found["attention_magnitude"]) == pytest.approx(float(magnitude), rel=FRAGILITY_FLOAT32)


def test_the_quantities_of_v1_are_those_of_dense_algebra():
    of = call(1)
    found = attention_fragility(of)
    scores, p = dense(of)
    q, k, v = of.query.double(), repeated(of.key), of.value.double()
    norms = [torch.linalg.matrix_norm(x, ord=2) for x in (q, k, q @ k.mT * SCALE)]
    kappa_score = (norms[0] * norms[1] / (norms[2] * DIM**0.5)).amax()
    assert 1 / SIGMA_LOOSENESS < float(found["kappa_score"] / kappa_score) < SIGMA_LOOSENESS**2
    rows = sampled_rows(LENGTH)
    largest = torch.linalg.eigvalsh(jacobians(p[:, :, rows]))[..., -1]
    kappa_softmax = (largest * scores[:, :, rows].norm(dim=-1) / p[:, :, rows].norm(dim=-1)).amax()
    assert 0.9 < float(found["kappa_softmax_v1"] / kappa_softmax) < 1 + FRAGILITY_FLOAT32  # power iteration, from below
    sigma = torch.linalg.svdvals(v)
    kappa_value = (sigma[..., 0] / (sigma[..., -1] + 3e-6)).amax()
    assert float(found["kappa_value"]) == pytest.approx(float(kappa_value), rel=1e-5)


def test_the_jacobian_norm_approaches_the_spectral_norm_from_below():
    p = (3 * torch.randn(64, 29, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).softmax(-1)
    exact = torch.linalg.eigvalsh(jacobians(p))[:, -1]
    two, many = jacobian_norm(p), jacobian_norm(p, 3000)
    assert bool((two <= exact * (1 + 1e-12)).all())
    assert bool((many <= exact * (1 + 1e-12)).all())
    torch.testing.assert_close(many, exact, rtol=1e-3, atol=0)
    assert float((two / exact).median()) > 0.5
    pair = torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64)
    assert float(jacobian_norm(pair, 5)) == pytest.approx(0.5)  # the largest there is
    assert float(jacobian_norm(torch.tensor([1.0, 0, 0]))) == 0


def test_grouped_heads_are_their_repeated_copies():
    of = call(3)
    copies = replace(of, key=repeated(of.key).float(), value=repeated(of.value).float())
    one, other = attention_fragility(of), attention_fragility(copies)
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=FRAGILITY_FLOAT32), name


def test_rows_are_taken_in_blocks(monkeypatch):
    of = call(4)
    whole = attention_fragility(of)
    shapes = []
    logits = AttentionCall.logits

    def spy(self, rows):
        shapes.append(len(rows))
        return logits(self, rows)

    monkeypatch.setattr(AttentionCall, "logits", spy)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", BATCH * HEADS * LENGTH * 5)
    blocks = attention_fragility(of)
    assert max(shapes) == 16  # the sampled rows
    assert shapes[:2] == [5, 5]
    for name in whole:
        assert float(whole[name]) == pytest.approx(float(blocks[name]), rel=FRAGILITY_FLOAT32), name


@pytest.mark.parametrize("length", [1, 2, 37, 300])
def test_strata_cover_every_row_once(length):
    rows, weights = row_strata(length)
    assert sum(weights) == length
    assert rows == sorted(set(rows))
    assert rows[0] >= 0
    assert rows[-1] < length
    assert len(rows) <= 17
    assert sampled_rows(length)[-1] < length


def test_sampled_norms_estimate_the_exact_ones():
    of = call(5, length=300)
    exact, sampled = softmax_norms(of), softmax_norms(of, "sampled")
    for a, b in zip(exact, sampled, strict=True):
        assert 0.7 < float(b / a) < 1.4
        assert float(a) != float(b)


def test_masks_caps_and_padding():
    of = call(6)
    tokens = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    tokens[1, 30:] = False
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    padded = replace(of, tokens=tokens, visible=lambda rows: (causal & tokens[:, None])[:, None, rows])
    parts = [AttentionCall(of.query[i : i + 1, :, :n], of.key[i : i + 1, :, :n], of.value[i : i + 1, :, :n], SCALE)
             for i, n in ((0, LENGTH), (1, 30))]  # fmt: skip
    whole = softmax_norms(padded)
    separate = [softmax_norms(part) for part in parts]
    for i in range(2):
        alone = (separate[0][i] ** 2 + separate[1][i] ** 2).sqrt()
        assert float(whole[i]) == pytest.approx(float(alone), rel=FRAGILITY_FLOAT32)
    poisoned = replace(padded, query=of.query.clone(), value=of.value.clone())
    poisoned.query[1, :, 30:], poisoned.value[1, :, 30:] = 1e4, 1e4
    one, other = attention_fragility(padded), attention_fragility(poisoned)
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=FRAGILITY_FLOAT32), name
    shifted = replace(of, bias=lambda rows: torch.full((1, 1, len(rows), LENGTH), 0.5))
    torch.testing.assert_close(shifted.logits(torch.arange(3))[1], of.logits(torch.arange(3))[1])
    assert not torch.equal(shifted.logits(torch.arange(3))[0], of.logits(torch.arange(3))[0])
    capped = replace(of, softcap=0.5).logits(torch.arange(LENGTH))[0]
    assert 0.4 < float(capped.abs().amax()) <= 0.5
    nothing = replace(of, visible=lambda rows: torch.zeros(1, 1, len(rows), LENGTH, dtype=torch.bool))
    assert float(softmax_norms(nothing)[1]) == 0


@pytest.mark.parametrize("centred", [True, False])
def test_the_norm_magnitude_bounds_the_jacobian(centred):
    torch.manual_seed(7)
    x, gain, epsilon = torch.randn(5, 12, dtype=torch.float64) * 0.3 + 0.2, torch.randn(12, dtype=torch.float64), 0.01

    def norm(row):
        row = row - row.mean() if centred else row
        return gain * row / (row.square().mean() + epsilon).sqrt()

    found, median = norm_magnitude(x, gain, epsilon, centred)
    spread = x.var(-1, correction=0) if centred else x.square().mean(-1)
    exact = gain.abs().amax() * ((epsilon + 2 * spread) / (spread + epsilon) ** 1.5 * x.norm(dim=-1)).norm()
    assert float(found) == pytest.approx(float(exact), rel=FRAGILITY_FLOAT32)
    assert float(median) == pytest.approx(float(spread.median()), rel=FRAGILITY_FLOAT32)
    for row in x:
        jacobian = torch.autograd.functional.jacobian(norm, row)
        own, _ = norm_magnitude(row[None], gain, epsilon, centred)
        assert float(torch.linalg.matrix_norm(jacobian, ord=2) * row.norm()) <= float(own)


def test_no_gain_is_a_gain_of_one():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(8))
    assert norm_magnitude(x, None, 1e-5, False)[0] == norm_magnitude(x, torch.ones(8), 1e-5, False)[0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="norms must be 'exact' or 'sampled', got 'both'"):
        attention_fragility(call(), norms="both")
    of = call()
    with pytest.raises(ValueError, match="as many keys as queries: got 3 and 37; pass use_cache=False"):
        attention_fragility(replace(of, query=of.query[:, :, :3]))
