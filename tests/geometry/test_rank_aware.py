"""The rank-aware bound: its tail and failure probability against Monte Carlo, its gains, its limits, α on a model."""

import functools
import math

import pytest
import torch
from torch.nn.functional import normalize
from transformers.models.llama import modeling_llama

from benchmarks.rank_aware import MODELS, OFFSET_SQUARINGS, gain_table, observe_model, offset_sigma_upper, rotations
from hf_geoscale.geometry import alpha_min, gram, looseness, rank_aware_gain, typicality_gamma
from hf_geoscale.integrations.families import attention_sites

from ..conftest import tiny_model, tokens
from ..test_benchmarks import ROOT
from ..tolerances import FLOAT32_ROUNDOFF, FLOAT64_ROUNDOFF

# model: width, rank, length, query heads, layers; gain and α_min as derived in docs/numerics.md; gain with all of δ on γ
SHAPES = {
    "GPT-2 XL": (1600, 64, 1024, 25, 48, 8.4, 0.073, 8.5),
    "Mistral-7B": (4096, 128, 4096, 32, 32, 13.9, 0.037, 14.1),
    "Llama-2-13B": (5120, 128, 4096, 40, 40, 17.3, 0.030, 17.5),
    "Llama-2-70B": (8192, 128, 4096, 64, 80, 27.3, 0.019, 27.6),
}


@pytest.mark.parametrize("model", SHAPES)
def test_published_range(model):
    width, rank, length, heads, layers, gain, alpha, gain_of_all = SHAPES[model]
    found, gamma = alpha_min(width, rank, length, heads, layers, 1e-6)
    assert rank_aware_gain(width, rank, gamma) == pytest.approx(gain, abs=0.06)
    assert found == pytest.approx(alpha, abs=6e-4)
    gamma = typicality_gamma(rank, length * heads * layers, 1e-6)
    assert rank_aware_gain(width, rank, gamma) == pytest.approx(gain_of_all, abs=0.05)


def test_the_published_table_is_what_the_script_computes():
    assert {name: tuple(shape) for name, shape in MODELS.items()} == {name: row[:5] for name, row in SHAPES.items()}
    assert "\n".join(gain_table()) in (ROOT / "docs" / "rank_aware.md").read_text()


@pytest.mark.parametrize(("width", "rank"), [(64, 8), (256, 32), (576, 64)])
def test_gamma_bounds_the_energy_of_uniform_directions(width, rank):
    gamma = typicality_gamma(rank, 1, 1e-3)
    x = torch.nn.functional.normalize(torch.randn(200_000, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    energy = (x[:, :rank] ** 2).sum(-1)
    assert (energy > gamma * rank / width).double().mean() <= 1e-3
    assert (energy > rank / width).double().mean() > 0.3


def test_gamma_solves_its_equation():
    gamma = typicality_gamma(64, 1e6, 1e-6)
    assert 1e6 * math.exp(-32 * (gamma - 1 - math.log(gamma))) == pytest.approx(1e-6, rel=1e-6)


PAIRS = 100_000
LEVELS = (1e-1, 1e-2, 1e-3)
"""Values of the tail bound at which it is tested; were it exact, the last would see 100 events."""

ATYPICAL = 1e-4
SIGMAS = 3
"""Standard errors between a measured frequency and what it is compared with."""


def allowance(probability: float, trials: int) -> float:
    return SIGMAS * math.sqrt(probability * (1 - probability) / trials)


def alpha_at(level: float, width: int, rank: int, gamma: float) -> float:
    """α at which the tail 2·exp(−d²α²/(2γr)) of one pair is `level`."""
    return math.sqrt(2 * gamma * rank * math.log(2 / level)) / width


def directions(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def factors(width: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal U, V (2, d, r). M = U Vᵀ has r singular values of 1, the worst case of that rank, and σ(M) = 1."""
    return torch.linalg.qr(torch.randn(2, width, rank, generator=generator)).Q


def test_alpha_min_is_the_tail_at_its_share_of_the_failure_probability():
    alpha, gamma = alpha_min(128, 8, 64, 2, 3, 0.3)
    assert alpha == pytest.approx(alpha_at(0.15 / (64**2 * 2 * 3), 128, 8, gamma))
    assert gamma == typicality_gamma(8, 64 * 2 * 3, 0.15)


@pytest.mark.parametrize(("width", "rank"), [(64, 4), (128, 8), (256, 32), (384, 64)])
def test_tail_at_the_longest_typical_key(width, rank):
    """Where the bound is used up: a key of energy γr/d. There even an exponent twice too large is caught."""
    gamma, generator = typicality_gamma(rank, 1, ATYPICAL), torch.Generator().manual_seed(0)
    left, _ = factors(width, rank, generator)
    key = directions(PAIRS, rank, generator=generator) * math.sqrt(gamma * rank / width)
    logits = ((directions(PAIRS, width, generator=generator) @ left) * key).sum(-1).abs()
    for level in LEVELS:
        failed = (logits > alpha_at(level, width, rank, gamma)).double().mean()
        assert failed <= level - allowance(level, PAIRS)
    for mutant in (gamma / 4, 1.0, gamma / 2):  # α halved; γ ignored; exp(−d²α²/(γr))
        failed = (logits > alpha_at(level, width, rank, mutant)).double().mean()
        assert failed > level + allowance(level, PAIRS)


@pytest.mark.parametrize(("width", "rank"), [(32, 2), (64, 4), (256, 32)])
def test_tail_of_a_pair(width, rank):
    generator, gamma = torch.Generator().manual_seed(0), typicality_gamma(rank, 1, ATYPICAL)
    left, right = factors(width, rank, generator)
    queries, keys = (directions(PAIRS, width, generator=generator) @ side for side in (left, right))
    logits, typical = (queries * keys).sum(-1).abs(), keys.square().sum(-1) <= gamma * rank / width
    for level in LEVELS:
        exceeds = logits > alpha_at(level, width, rank, gamma)
        assert (exceeds & typical).double().mean() <= level - allowance(level, PAIRS)
        assert exceeds.double().mean() <= level + ATYPICAL
    if rank <= 4:  # long keys make a tail heavier than γ = 1 has it; at large ranks keys hardly differ in length
        failed = (logits > alpha_at(level, width, rank, 1.0)).double().mean()
        assert failed > level + ATYPICAL + allowance(level + ATYPICAL, PAIRS)


@functools.cache
def simulated_peaks(width, rank, length, heads, layers, trials, tied=False):
    """Largest |S|/B₁ of each trial (trials,), and the largest without pairs of a token with itself. tied: V = U."""
    generator = torch.Generator().manual_seed(0)
    largest, apart = torch.zeros(trials), torch.zeros(trials)
    for _ in range(layers):
        x = directions(trials, length, width, generator=generator)
        for _ in range(heads):
            left, right = factors(width, rank, generator)
            logits = (x @ left @ (x @ (left if tied else right)).mT).abs()
            largest = torch.maximum(largest, logits.amax((1, 2)))
            logits.diagonal(dim1=1, dim2=2).zero_()
            apart = torch.maximum(apart, logits.amax((1, 2)))
    return largest, apart


FAILURES = [0.05, 0.3]
MUTATED = (128, 8, 64, 2, 2, 2000)


@pytest.mark.parametrize("failure_prob", FAILURES)
@pytest.mark.parametrize(
    "shape", [(64, 4, 32, 2, 2, 1000), MUTATED, (256, 16, 64, 2, 1, 500), (384, 64, 64, 1, 1, 500)]
)
def test_alpha_min_fails_no_more_often_than_promised(shape, failure_prob):
    alpha, _ = alpha_min(*shape[:5], failure_prob)
    failed = (simulated_peaks(*shape)[0] > alpha).double().mean()
    assert failed <= failure_prob - allowance(failure_prob, shape[-1])


@pytest.mark.parametrize("failure_prob", FAILURES)
@pytest.mark.parametrize("mutant", ["half of α", "γ ignored"])
def test_mutants_of_alpha_min_fail_more_often_than_promised(mutant, failure_prob, monkeypatch):
    if mutant == "γ ignored":
        monkeypatch.setattr("hf_geoscale.geometry.rank_aware.typicality_gamma", lambda *_: 1.0)
    alpha, _ = alpha_min(*MUTATED[:5], failure_prob)
    alpha = alpha / 2 if mutant == "half of α" else alpha
    failed = (simulated_peaks(*MUTATED)[0] > alpha).double().mean()
    assert failed > failure_prob + allowance(failure_prob, MUTATED[-1])


@pytest.mark.parametrize("shape", [(256, 32, 64, 1, 1, 300), (384, 64, 64, 1, 1, 300)])
def test_a_token_with_itself_is_outside_the_theorem(shape):
    """W_Q = W_K: S = ‖Uᵀu‖² of the diagonal is r/d on average and needs γr/d; every other pair keeps to α_min."""
    width, rank, *_, trials = shape
    largest, apart = simulated_peaks(*shape, tied=True)
    alpha, gamma = alpha_min(*shape[:5], 0.05)
    assert (largest > alpha).double().mean() > 0.05 + allowance(0.05, trials)
    assert (apart > alpha).double().mean() <= 0.05 - allowance(0.05, trials)
    assert (largest > max(alpha, gamma * rank / width)).double().mean() <= 0.05 - allowance(0.05, trials)


def test_rope_is_covered_with_the_norm_at_its_worst_offset():
    """q = (x₁, εx₂), k = (εx₃, x₄) in halves: σ(M) = ε, but a turn by π/2 pairs x₁ with x₄ and the norm is 1."""
    width, rank, length, trials, small = 128, 8, 64, 500, 0.05
    left, right = factors(width, rank, torch.Generator().manual_seed(0))
    x = directions(trials, length, width, generator=torch.Generator().manual_seed(1))
    high, low = torch.ones(rank // 2), torch.full((rank // 2,), small)
    turn = torch.polar(torch.ones(length), torch.arange(length) * math.pi / 4)[:, None]
    q, k = ((x @ side) * torch.cat(gains) for side, gains in ((left, (high, low)), (right, (low, high))))
    q, k = (torch.complex(*z.chunk(2, dim=-1)) * turn for z in (q, k))
    peaks = (q @ k.mH).real.abs().amax((1, 2))
    alpha, _ = alpha_min(width, rank, length, 1, 1, 0.05)
    assert (peaks > alpha * small).double().mean() > 0.05 + allowance(0.05, trials)
    assert (peaks > alpha).double().mean() <= 0.05 - allowance(0.05, trials)


def spied_alphas(model, ids, monkeypatch, position_ids=None):
    """α of every layer, from the q and k that the model hands to its attention, against singular values in float64."""
    logits = []

    def spy(module, query, key, value, mask, **options):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits.append((query @ keys.mT * module.scaling).tril().abs().amax((0, 2, 3)).double())
        return eager(module, query, key, value, mask, **options)

    eager = modeling_llama.eager_attention_forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", spy)
        model.set_attn_implementation("eager")
        model(input_ids=ids, position_ids=position_ids, use_cache=False)
    alphas = []
    for site, largest in zip(attention_sites(model), logits, strict=True):
        matrix_q, matrix_k = (p.matrix() for p in site.projections()[:2])
        repeated = matrix_k.repeat_interleave(len(matrix_q) // len(matrix_k), dim=0)
        sigma = torch.linalg.svdvals(matrix_q.mT @ repeated)[:, 0]
        alphas.append(float((largest / (sigma * matrix_q.shape[-1] * site.softmax_scale)).max()))
    return alphas


@torch.no_grad()
def test_observed_alphas_are_those_of_the_model(monkeypatch):
    model, ids = tiny_model("llama"), tokens(2, 40)
    rows, loose = observe_model(model, ids), looseness(model.config.head_dim)
    for row, alpha in zip(rows, spied_alphas(model, ids, monkeypatch), strict=True):
        assert alpha / loose * (1 - FLOAT32_ROUNDOFF) <= row.rope <= alpha * (1 + FLOAT32_ROUNDOFF)
        assert row.diagonal <= row.still <= 1 + FLOAT32_ROUNDOFF
        assert row.rope_product < row.rope_offset <= row.rope
    first = spied_alphas(model, ids, monkeypatch, torch.zeros_like(ids))[0]  # later layers would see other tokens
    assert first / loose * (1 - FLOAT32_ROUNDOFF) <= rows[0].still <= first * (1 + FLOAT32_ROUNDOFF)
    assert rows[0].still != pytest.approx(rows[0].rope, rel=0.05)


@torch.no_grad()
def test_observed_tokens_are_those_of_the_model():
    model, ids = tiny_model("llama"), tokens(2, 40)
    unit = normalize(model.get_input_embeddings()(ids), dim=-1).double()
    apart = ~torch.eye(40, dtype=torch.bool)
    row = observe_model(model, ids)[0]
    assert row.cosine == pytest.approx(float((unit @ unit.mT)[:, apart].mean()), rel=1e-4)
    keys = next(attention_sites(model)).projections()[1].matrix()
    projected = unit[:, None] @ (torch.linalg.pinv(keys) @ keys)
    assert row.energy == pytest.approx(float(projected.square().sum(-1).max()) * 64 / 16, rel=1e-4)


@torch.no_grad()
def test_norm_at_the_worst_offset():
    model = tiny_model("llama")  # which its sites do not keep alive
    site = next(attention_sites(model))
    matrix_q, matrix_k = (projection.matrix() for projection in site.projections()[:2])
    rotation = rotations(site, 40)
    angles = torch.arange(40)[:, None] * site.rotary[0].inv_freq
    cos, sin = angles.cos().diag_embed(), angles.sin().diag_embed()
    expected = torch.cat([torch.cat([cos, -sin], dim=-1), torch.cat([sin, cos], dim=-1)], dim=-2).double()
    torch.testing.assert_close(rotation, expected, atol=1e-6, rtol=0)
    # Query i and key j meet as qᵀ R_iᵀ R_j k = qᵀ R_Δᵀ k with Δ = i − j.
    turned = rotation.mT[:, None] @ matrix_k.repeat_interleave(2, dim=0)
    exact = torch.linalg.svdvals(matrix_q.mT @ turned)[..., 0].amax(0)
    upper = offset_sigma_upper(gram(matrix_q), gram(matrix_k), rotation)
    assert (exact <= upper * (1 + FLOAT64_ROUNDOFF)).all()
    assert (upper <= exact * looseness(16, OFFSET_SQUARINGS)).all()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama-bias-yarn"])
def test_observe_refuses_models_outside_its_formula(family):
    with pytest.raises(ValueError, match=r"Llama or Mistral without biases, got a \w+ model \(layer 0\)"):
        observe_model(tiny_model(family), tokens(1, 8))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"rank": 0, "events": 1, "failure_prob": 0.1}, "rank"), ({"rank": 1, "events": 1, "failure_prob": 1.0}, "1.0")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        typicality_gamma(**arguments)
    with pytest.raises(ValueError, match="length must be positive, got -3"):
        alpha_min(64, 8, -3, 1, 1)
