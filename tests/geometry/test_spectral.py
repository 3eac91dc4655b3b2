"""Two-sided spectral norms against float64 singular values."""

import pytest
import torch

from hf_geoscale.geometry import (
    gram,
    interaction_power_iteration,
    interaction_sigma_upper,
    looseness,
    power_iteration,
    sigma_upper,
    start_vectors,
    trace_power_bound,
)

from ..conftest import here
from ..tolerances import FLOAT64_ROUNDOFF


def matrices(kind: str, heads: int, dim: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim + heads)
    a = torch.randn(heads, dim, width, dtype=torch.float64, generator=generator)
    if kind == "rank one":
        a = a[..., :1] @ a[..., :1, :]
    elif kind == "wide range":
        a = a * torch.logspace(-6, 6, dim, dtype=torch.float64)[:, None]
    elif kind == "equal singular values":
        a = torch.linalg.qr(a.mT)[0].mT
    elif kind == "tiny":
        a = a * 1e-60
    elif kind == "zero":
        a = torch.zeros_like(a)
    return a


def starts(heads: int, width: int) -> torch.Tensor:
    return start_vectors(heads, width, here())


KINDS = ("random", "rank one", "wide range", "equal singular values", "tiny", "zero")
SHAPES = ((4, 16, 16), (3, 64, 576), (2, 80, 131), (1, 1, 7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
class TestBothSidesOfSigma:
    def test_lower_and_upper_enclose_sigma(self, kind, shape):
        a = matrices(kind, *shape)
        sigma = torch.linalg.svdvals(a)[:, 0]
        lower, _ = power_iteration(a, starts(shape[0], shape[2]), rounds=5)
        upper = sigma_upper(gram(a))
        slack = 1 + FLOAT64_ROUNDOFF
        assert (lower <= sigma * slack).all()
        assert (upper * slack >= sigma).all()
        assert (upper <= sigma * looseness(shape[1]) * slack + 1e-300).all()

    def test_interaction(self, kind, shape):
        heads, dim, width = shape
        q, k = matrices(kind, 2 * heads, dim, width), matrices(kind, heads, dim, width).roll(1, -1)
        expected = torch.linalg.svdvals(q.mT @ k.repeat_interleave(2, 0))[:, 0]
        lower, vectors = interaction_power_iteration(q, k, starts(2 * heads, width), rounds=5)
        upper = interaction_sigma_upper(gram(q), gram(k))
        product = torch.linalg.svdvals(q)[:, 0] * torch.linalg.svdvals(k)[:, 0].repeat_interleave(2, 0)
        roundoff = product * FLOAT64_ROUNDOFF
        assert (lower <= expected + roundoff).all()
        assert (upper >= expected - roundoff).all()
        # float64 cannot resolve σ² below 2⁻⁴⁰ of the product of the norms, and the bound says so
        assert (upper <= expected * looseness(dim) ** 2 + product * 2.0**-19 + 1e-300).all()
        assert vectors.shape == (2 * heads, width)


def test_power_iteration_converges_and_warm_start_tracks():
    q, k = matrices("random", 4, 64, 576), matrices("random", 2, 64, 576)
    exact = torch.linalg.svdvals(q.mT @ k.repeat_interleave(2, 0))[:, 0]
    cold, vectors = interaction_power_iteration(q, k, starts(4, 576), rounds=200)
    torch.testing.assert_close(cold, exact, rtol=1e-4, atol=0)
    moved = q * (1 + 1e-3)
    warm, _ = interaction_power_iteration(moved, k, vectors, rounds=1)
    torch.testing.assert_close(warm, exact * (1 + 1e-3), rtol=1e-4, atol=0)
    restarted, _ = interaction_power_iteration(moved, k, starts(4, 576), rounds=1)
    assert (restarted < 0.9 * warm).all()


def test_query_heads_use_the_key_head_of_their_group():
    q = matrices("random", 4, 16, 32)
    k = torch.stack([torch.zeros(16, 32, dtype=torch.float64), matrices("random", 1, 16, 32)[0]])
    upper = interaction_sigma_upper(gram(q), gram(k))
    lower, _ = interaction_power_iteration(q, k, starts(4, 32), rounds=3)
    assert (upper[:2] < 1e-4).all()
    assert (lower[:2] == 0).all()
    assert (lower[2:] > 1).all()


def test_nan_is_never_hidden():
    a = matrices("random", 2, 8, 16)
    a[1, 3, 3] = float("nan")
    upper = sigma_upper(gram(a))
    assert torch.isfinite(upper[0])
    assert torch.isnan(upper[1])


def test_trace_power_is_looser_with_fewer_squarings():
    g = gram(matrices("equal singular values", 1, 64, 128))
    bounds = [float(trace_power_bound(g, squarings)) for squarings in (1, 3, 7)]
    assert bounds == sorted(bounds, reverse=True)
    for squarings, bound in zip((1, 3, 7), bounds, strict=True):
        assert bound == pytest.approx(64 ** (1 / 2**squarings), rel=1e-9)


@pytest.mark.parametrize("magnitude", [1e-100, 1.0, 1e100])
def test_trace_powers_of_many_equal_eigenvalues_do_not_underflow(magnitude):
    """After division by the trace each is 1/512, whose 128th power is below every float64."""
    bound = trace_power_bound(magnitude * torch.eye(512, dtype=torch.float64))
    torch.testing.assert_close(bound / magnitude, torch.tensor(512 ** (1 / 128), dtype=torch.float64))
