"""Certificates hold for every input: random, adversarial, rotated; and are nearly reached, so that the tests could fail."""

import math

import pytest
import torch

from hf_geoscale.geometry import (
    Projection,
    entry_bound,
    logit_bound,
    measure_layer,
    operand_bound,
)
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN
from hf_geoscale.geometry.layer import measure_interaction, weight_drift_budget

DIM, WIDTH = 16, 48


def projection(heads: int, seed: int, offset: bool, rotary_factor: float = 1.0) -> Projection:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    extra = {"norm_shift": draw(WIDTH), "bias": 3 * draw(heads, DIM)} if offset else {}
    return Projection(draw(heads, DIM, WIDTH), norm_gain=1 + draw(WIDTH), rotary_factor=rotary_factor, **extra)


def apply(p: Projection, u: torch.Tensor) -> torch.Tensor:
    """(T, d) tokens → (H, T, D), straight from the definition."""
    x = u.double()
    x = x if p.norm_gain is None else x * p.norm_gain
    x = x if p.norm_shift is None else x + p.norm_shift
    y = torch.einsum("hcd,td->htc", p.weight.double(), x)
    y = y if p.bias is None else y + p.bias[:, None]
    return y * p.rotary_factor


def on_sphere(u: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(u.double(), dim=-1) * math.sqrt(u.shape[-1])


def worst_tokens(p: Projection) -> torch.Tensor:
    """For each head the top singular direction of A, signed to agree with the offset: (H, d)."""
    left, _, right = torch.linalg.svd(p.matrix(), full_matrices=False)
    sign = torch.sign((left[..., 0] * p.offset()).sum(-1, keepdim=True))
    return on_sphere(right[:, 0] * torch.where(sign == 0, 1.0, sign))


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of (..., T, D) at the given positions, base 10000, in float64."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


@pytest.mark.parametrize("offset", [False, True], ids=["rmsnorm", "shift and bias"])
@pytest.mark.parametrize("rotary_factor", [1.0, 1.37])
class TestCertificates:
    def test_norms_random_and_adversarial(self, offset, rotary_factor):
        p = projection(4, 0, offset, rotary_factor)
        bound = operand_bound(p)
        random = on_sphere(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1)))
        assert (apply(p, random).norm(dim=-1) <= bound[:, None]).all()
        worst = apply(p, worst_tokens(p)).norm(dim=-1).diagonal()
        assert (worst <= bound / (1 + ROUNDING_MARGIN)).all()
        assert (worst >= (0.7 if offset else 0.95) * bound / (1 + ROUNDING_MARGIN)).all()

    def test_short_tokens_stay_below(self, offset, rotary_factor):
        p = projection(2, 3, offset, rotary_factor)
        tiny = 1e-3 * on_sphere(torch.randn(64, WIDTH))
        assert (apply(p, tiny).norm(dim=-1) <= operand_bound(p)[:, None]).all()

    def test_entries_without_mixing(self, offset, rotary_factor):
        p = projection(4, 5, offset, rotary_factor)
        bound = entry_bound(p)
        rows = on_sphere((p.matrix() * torch.where(p.offset() < 0, -1.0, 1.0)[..., None]).flatten(0, 1))
        values = apply(p, rows).abs()  # (H, H·D, D): token i aims at entry i
        assert (values <= bound[:, None]).all()
        aimed = torch.einsum("hhcc->hc", values.view(4, 4, DIM, DIM))
        assert (aimed >= (0.93 if offset else 0.999) * bound / (1 + ROUNDING_MARGIN)).all()
        assert (bound <= operand_bound(p)[:, None]).all()

    def test_logits_with_rope_at_hurtful_offsets(self, offset, rotary_factor):
        q, k = projection(4, 7, offset, rotary_factor), projection(2, 8, offset, rotary_factor)
        softmax_scale = DIM**-0.5
        bound = logit_bound(operand_bound(q), operand_bound(k), softmax_scale)
        tokens = torch.cat([worst_tokens(q), worst_tokens(k), on_sphere(torch.randn(64, WIDTH))])
        keys = apply(k, tokens).repeat_interleave(2, 0)
        for offset_tokens in (0, 1, 3, 17, 251, 8191):
            queries = rope(apply(q, tokens), torch.full((len(tokens),), offset_tokens))
            logits = softmax_scale * queries @ keys.mT
            assert (logits.abs().amax((1, 2)) <= bound).all()


def test_rope_breaks_the_norm_of_the_interaction():
    """A query along one axis of a rotary pair, a key along the other: σ(W_Q W_Kᵀ) is nearly 0, the rotated logit is not."""
    half = DIM // 2
    wq, wk = torch.zeros(1, DIM, WIDTH), torch.zeros(1, DIM, WIDTH)
    wq[0, 0, 0] = wk[0, half, 0] = 1.0
    wk[0, 0, 0] = 1 / 30
    q, k, scale = Projection(wq), Projection(wk), DIM**-0.5
    u = on_sphere(torch.eye(WIDTH)[:1])
    position = torch.tensor([1.5707963267948966])  # a quarter turn of the fastest pair
    logit = scale * float(apply(q, u)[0, 0] @ rope(apply(k, u), -position)[0, 0])
    sigma, worst_case = measure_interaction(q, k, scale)
    assert abs(logit) > 29 * float(worst_case)
    assert abs(logit) <= float(logit_bound(operand_bound(q), operand_bound(k), scale))
    assert float(sigma) == pytest.approx(1 / 30, rel=0.02)


def test_head_norm_bound_ignores_the_projection():
    gain = torch.tensor([0.5, -3.0, 1.0, 2.0])
    bound = operand_bound(Projection.of_head_norm(gain, heads=2, rotary_factor=1.5))
    expected = 1.5 * math.sqrt(4) * 3.0 * (1 + ROUNDING_MARGIN)
    assert bound.tolist() == pytest.approx([expected] * 2, rel=0.03)
    assert (bound >= expected).all()


class TestMeasureLayer:
    def test_agrees_with_its_parts(self):
        q, k, v = projection(4, 0, True), projection(2, 1, True), projection(2, 2, True)
        layer = measure_layer(q, k, v, 0.25)
        torch.testing.assert_close(layer.q_bound, operand_bound(q))
        torch.testing.assert_close(layer.v_bound, operand_bound(v))
        torch.testing.assert_close(layer.logit_bound, logit_bound(layer.q_bound, layer.k_bound, 0.25))
        sigma, worst_case = measure_interaction(q, k, 0.25)
        assert (layer.sigma_lower <= sigma).all()
        assert (layer.sigma_lower >= 0.9 * sigma).all()
        torch.testing.assert_close(worst_case, sigma * (WIDTH + 1) * 0.25)

    def test_drift_budget_covers_what_it_promises(self):
        """Moving every weight by the budget, in the worst direction we can construct, stays within the headroom."""
        headroom = 1.5
        q = projection(3, 4, True)
        budget = measure_layer(q, q, q, 1.0, headroom=headroom).max_weight_drift
        assert 0 < budget < 1
        left, _, right = torch.linalg.svd(q.matrix(), full_matrices=False)
        push = budget * torch.sign(
            left[..., 0, None] * right[..., 0, None, :] / torch.where(q.norm_gain < 0, -1.0, 1.0)
        )
        moved = Projection(
            (q.weight + push).float(),
            norm_gain=q.norm_gain + budget * torch.sign(q.norm_gain),
            norm_shift=q.norm_shift + budget * torch.sign(q.norm_shift),
            bias=q.bias + budget * torch.sign(q.bias),
        )
        assert (operand_bound(moved) <= headroom * operand_bound(q)).all()
        assert (operand_bound(moved) > operand_bound(q)).all()

    def test_no_headroom_no_drift(self):
        q = projection(2, 4, False)
        assert measure_layer(q, q, q, 1.0).max_weight_drift == 0.0


@pytest.mark.feature("LoRA dropout")
class TestExcess:
    """What a module computes beyond its affine map, bounded entry by entry."""

    def projections(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 8, 24, generator=generator)
        excess = 20 * torch.rand(3, 8, generator=generator)
        return Projection(weight, rotary_factor=1.5), Projection(weight, rotary_factor=1.5, excess=excess)

    def test_the_worst_deviation_stays_within_the_certificate(self):
        plain, wider = self.projections()
        matrix = wider.matrix()
        right = torch.linalg.svd(matrix, full_matrices=False)[2]
        token = right[:, 0] * 24**0.5
        output = (matrix @ token[..., None]).squeeze(-1)
        moved = output + output.sign() * wider.excess * 1.5  # the furthest corner of the box
        assert (moved.norm(dim=-1) <= operand_bound(wider)).all()
        assert (moved.norm(dim=-1) > operand_bound(plain)).any()
        assert (
            operand_bound(wider)
            <= operand_bound(plain) + 1.5 * wider.excess.double().norm(dim=-1) * (1 + ROUNDING_MARGIN) + 1e-9
        ).all()
        row = matrix / matrix.norm(dim=-1, keepdim=True) * 24**0.5
        entries = (matrix * row).sum(-1).abs() + 1.5 * wider.excess
        assert (entries <= entry_bound(wider)).all()
        assert (entries > entry_bound(plain)).any()

    def test_it_leaves_no_budget_for_drift(self):
        plain, wider = self.projections()
        assert float(weight_drift_budget(plain, operand_bound(plain), 4.0)) > 0
        assert float(weight_drift_budget(wider, operand_bound(wider), 4.0)) == 0
