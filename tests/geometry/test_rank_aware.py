"""The rank-aware bound: its tail against Monte Carlo, its published range, its errors."""

import math

import pytest
import torch

from hf_geoscale.geometry import alpha_min, rank_aware_gain, typicality_gamma

# model: width, rank, length, query heads, layers, gain and α_min as derived in docs/numerics.md
SHAPES = {
    "GPT-2 XL": (1600, 64, 1024, 25, 48, 8.4, 0.073),
    "Mistral-7B": (4096, 128, 4096, 32, 32, 13.9, 0.037),
    "Llama-2-13B": (5120, 128, 4096, 40, 40, 17.3, 0.030),
    "Llama-2-70B": (8192, 128, 4096, 64, 80, 27.3, 0.019),
}


@pytest.mark.parametrize("model", SHAPES)
def test_published_range(model):
    width, rank, length, heads, layers, gain, alpha = SHAPES[model]
    found, gamma = alpha_min(width, rank, length, heads, layers, 1e-6)
    assert rank_aware_gain(width, rank, gamma) == pytest.approx(gain, abs=0.06)
    assert found == pytest.approx(alpha, abs=6e-4)


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"rank": 0, "events": 1, "failure_prob": 0.1}, "rank"), ({"rank": 1, "events": 1, "failure_prob": 1.0}, "1.0")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        typicality_gamma(**arguments)
    with pytest.raises(ValueError, match="length must be positive, got -3"):
        alpha_min(64, 8, -3, 1, 1)
