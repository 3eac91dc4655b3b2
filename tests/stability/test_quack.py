"""Logit-change control on plain slices: what it promises about the change of the logits, and what it refuses."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_geoscale.stability import HeadSlices, LogitChangeControl, LogitWeights
from hf_geoscale.stability.quack import INITIAL_REACH

from ..tolerances import FLOAT64_ROUNDOFF

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 16


class Projections(nn.Module):
    """Queries and grouped keys of tokens, and their logits."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (L, d) → (Hq, L, L)
        q, k = self.q(x).view(-1, HEADS, DIM), self.k(x).view(-1, KV_HEADS, DIM)
        return torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) / DIM**0.5


def projections(seed: int = 0) -> Projections:
    torch.manual_seed(seed)
    return Projections().double()


def slices_of(model: Projections) -> LogitWeights:
    labels = torch.arange(HEADS + KV_HEADS).repeat_interleave(DIM).split([HEADS * DIM, KV_HEADS * DIM])
    products = []
    for head in range(HEADS):
        key = HEADS + head // (HEADS // KV_HEADS)
        products += [(head, (key,)), (key, (head,))]
    weights = [HeadSlices(model, f"{name}.weight", rows, 0, name) for name, rows in zip("qk", labels, strict=True)]
    return LogitWeights(
        weights, [], [*(f"W_Q {h}" for h in range(HEADS)), *(f"W_K {g}" for g in range(KV_HEADS))], products
    )


def adamw(model: nn.Module, lr: float = 1e-3, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, **options)


def gradients(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


class TestChangeOfLogits:
    """‖ΔL‖ of one AdamW step, exact logits in float64, after the weights grew since the first step."""

    LEARNING_RATE = 1e-6  # the second-order part of ΔL is about this times the first
    SLACK = 1e-4

    def change(self, growth_q, growth_k, controlled: bool) -> torch.Tensor:
        """(Hq, L, L)."""
        model = projections()
        optimizer = adamw(model, self.LEARNING_RATE, weight_decay=0.0)
        if controlled:
            optimizer = LogitChangeControl(optimizer, slices_of(model))
            optimizer.factors()  # takes the norms at the start
        with torch.no_grad():
            for linear, growth in ((model.q, growth_q), (model.k, growth_k)):
                growth = torch.as_tensor(growth, dtype=torch.float64).expand(linear.out_features // DIM)
                linear.weight.mul_(growth.repeat_interleave(DIM)[:, None])
        x = torch.randn(12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        before = model(x).detach()
        gradients(model)
        optimizer.step()
        return (model(x) - before).detach()

    @pytest.mark.parametrize("growth", [(1.0, 10.0), (10.0, 1.0), (0.1, 10.0), (30.0, 30.0), (0.2, 0.5)])
    def test_does_not_depend_on_the_size_of_the_weights(self, growth):
        reference = self.change(1.0, 1.0, controlled=True)
        changed = self.change(*growth, controlled=True)
        torch.testing.assert_close(changed, reference, rtol=0, atol=self.SLACK * float(reference.abs().max()))

    @pytest.mark.parametrize("growth", [(1.0, 10.0), (10.0, 1.0), (30.0, 30.0)])
    def test_grows_with_the_weights_without_it(self, growth):
        reference = self.change(1.0, 1.0, controlled=False)
        assert self.change(*growth, controlled=False).norm() > 5 * reference.norm()

    def test_is_bounded_where_heads_grow_apart(self):
        """A shared W_K follows the largest W_Q of its group, so no head's change is more than the two parts' at the start."""
        x = torch.randn(12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        parts = []
        for still in ("q", "k"):
            model = projections()
            gradients(model)
            before = model(x).detach()
            getattr(model, still).weight.grad = None
            adamw(model, self.LEARNING_RATE, weight_decay=0.0).step()
            parts.append((model(x) - before).detach().flatten(1).norm(dim=1))
        growth_q, growth_k = [1.0, 40.0, 3.0, 0.5], [7.0, 0.3]
        norms = self.change(growth_q, growth_k, controlled=True).flatten(1).norm(dim=1)
        # head 1's ‖W_Q‖ decides its group; at the start another head's may have, by at most the ratio of their norms
        start = projections().q.weight.detach().view(HEADS, -1).norm(dim=1)
        spread = start.max() / start.min()
        assert (norms <= (parts[0] + parts[1]) * spread * (1 + self.SLACK)).all()
        plain = self.change(growth_q, growth_k, controlled=False).flatten(1).norm(dim=1)
        assert plain.max() > 5 * norms.max()


class TestFactors:
    def test_are_those_of_the_paper_head_by_head(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model), tau=0.3)
        q0, k0 = (w.detach().view(-1, DIM * WIDTH).norm(dim=1) for w in (model.q.weight, model.k.weight))
        torch.testing.assert_close(control.factors(), torch.full((6,), 0.3, dtype=torch.float64))
        with torch.no_grad():
            model.q.weight.mul_(torch.rand_like(model.q.weight) * 3)
            model.k.weight.mul_(torch.rand_like(model.k.weight))
        q, k = (w.detach().view(-1, DIM * WIDTH).norm(dim=1) for w in (model.q.weight, model.k.weight))
        expected = [0.3 * k0[h // 2] / k[h // 2] for h in range(HEADS)]
        expected += [0.3 * q0[2 * g : 2 * g + 2].max() / q[2 * g : 2 * g + 2].max() for g in range(KV_HEADS)]
        torch.testing.assert_close(control.factors(), torch.stack(expected), rtol=FLOAT64_ROUNDOFF, atol=0)

    def test_without_norms_are_tau(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model), tau=0.3, adaptive=False)
        with torch.no_grad():
            model.q.weight.mul_(7)
        assert control.factors().tolist() == [0.3] * 6
        assert INITIAL_REACH not in control.param_groups[0]


class TestUpdates:
    def test_the_first_step_with_tau_one_is_the_inner_optimizers_bit_for_bit(self):
        controlled, plain = projections(), projections()
        for model in (controlled, plain):
            gradients(model)
        LogitChangeControl(adamw(controlled), slices_of(controlled)).step()
        adamw(plain).step()
        for a, b in zip(controlled.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_equal_a_learning_rate_per_head_weight_decay_included(self):
        """Against AdamW on one parameter a head, each with its own learning rate."""
        model = projections()
        control = LogitChangeControl(adamw(model, weight_decay=0.5), slices_of(model), tau=2.0)
        heads = [nn.Parameter(w.detach().clone()) for p in model.parameters() for w in p.view(-1, DIM, WIDTH)]
        alone = torch.optim.AdamW([{"params": [h]} for h in heads], lr=1e-3, weight_decay=0.5)
        for _ in range(4):
            for group, factor in zip(alone.param_groups, control.factors().tolist(), strict=True):
                group["lr"] = 1e-3 * factor
            gradients(model)
            grads = [g for p in model.parameters() for g in p.grad.view(-1, DIM, WIDTH)]
            for head, grad in zip(heads, grads, strict=True):
                head.grad = grad.clone()
            control.step()
            alone.step()
        found = torch.cat([p.detach().view(-1, DIM, WIDTH) for p in model.parameters()])
        expected = torch.stack([h.detach() for h in heads])
        torch.testing.assert_close(found, expected, rtol=FLOAT64_ROUNDOFF, atol=1e-15)

    def test_a_gradient_factor_would_not_do(self):
        """Why the update is scaled: AdamW takes the same step for a gradient ten times as large."""
        small, large = projections(), projections()
        for model, factor in ((small, 1), (large, 10)):
            gradients(model)
            for parameter in model.parameters():
                parameter.grad *= factor
            adamw(model).step()
        torch.testing.assert_close(small.q.weight, large.q.weight, rtol=1e-6, atol=1e-9)

    def test_half_precision_weights_move_by_the_factor_before_they_are_rounded(self):
        model = projections().bfloat16()
        with pytest.warns(UserWarning, match=r"2 of the 2 weights.*half precision \(q: torch.bfloat16\).*in float32"):
            control = LogitChangeControl(torch.optim.SGD(model.parameters(), lr=0.125), slices_of(model), tau=0.3)
        start = model.q.weight.detach().clone()
        model.q.weight.grad = torch.ones_like(start)
        control.step()
        moved = (start - 0.125).double()
        exact = start.double() + 0.3 * (moved - start.double())
        nearest = (exact.bfloat16() - exact).abs()
        assert ((model.q.weight - exact).abs() <= nearest + 1e-7).all()  # float32's round-off may flip a tie
        assert torch.equal(model.k.weight, projections().bfloat16().k.weight)  # no gradient, no update

    def test_a_closure_is_passed_on_and_its_loss_returned(self):
        model = projections()
        control = LogitChangeControl(torch.optim.LBFGS(model.parameters(), max_iter=2), slices_of(model))

        def closure():
            control.zero_grad()
            loss = model(torch.ones(3, WIDTH, dtype=torch.float64)).square().sum()
            loss.backward()
            return loss

        first = control.step(closure)
        assert float(closure().detach()) < float(first.detach())


class TestState:
    def steps(self, model, control, count):
        for _ in range(count):
            gradients(model)
            control.step()

    def test_resuming_goes_on_with_the_norms_at_the_start(self):
        straight = projections()
        control = LogitChangeControl(adamw(straight, 0.1), slices_of(straight))
        self.steps(straight, control, 3)
        weights, file = copy.deepcopy(straight.state_dict()), io.BytesIO()
        torch.save(control.state_dict(), file)
        self.steps(straight, control, 2)
        resumed = projections(seed=5)
        resumed.load_state_dict(weights)
        again = LogitChangeControl(adamw(resumed, 0.1), slices_of(resumed))
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        self.steps(resumed, again, 2)
        assert torch.equal(straight.q.weight, resumed.q.weight)
        assert torch.equal(straight.k.weight, resumed.k.weight)
        fresh = LogitChangeControl(adamw(resumed), slices_of(resumed)).factors()
        assert not torch.allclose(fresh, again.factors())  # so the norms kept did matter

    def test_a_copy_steps_alike(self):
        model = projections()
        control = LogitChangeControl(adamw(model, 0.1), slices_of(model))
        self.steps(model, control, 2)
        other, other_control = copy.deepcopy((model, control))
        self.steps(model, control, 2)
        self.steps(other, other_control, 2)
        assert torch.equal(model.q.weight, other.q.weight)

    def test_a_plain_state_dict_starts_from_the_norms_of_the_next_step(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model))
        control.load_state_dict(adamw(model).state_dict())
        assert control.factors().tolist() == pytest.approx([1.0] * 6)

    def test_loading_replaces_the_norms_in_use(self):
        model = projections()
        control = LogitChangeControl(adamw(model, 0.1), slices_of(model))
        self.steps(model, control, 1)
        state = copy.deepcopy(control.state_dict())
        state["param_groups"][0][INITIAL_REACH] = [2 * x for x in state["param_groups"][0][INITIAL_REACH]]
        before = control.factors()
        control.load_state_dict(state)
        assert torch.equal(control.factors(), 2 * before)

    def test_another_models_state_is_refused(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model))
        control.param_groups[0][INITIAL_REACH] = [1.0, 2.0]
        with pytest.raises(ValueError, match="state is of 2 slices, the model has 6"):
            control.step()

    def test_schedulers_and_hooks_are_those_of_the_inner_optimizer(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model))
        schedule = torch.optim.lr_scheduler.LinearLR(control, 1.0, 0.5, total_iters=2)
        seen = []
        control.register_step_post_hook(lambda *_: seen.append("step"))
        control.register_state_dict_post_hook(lambda *_: seen.append("state"))
        for _ in range(2):
            gradients(model)
            control.step()
            schedule.step()
        control.state_dict()
        assert seen == ["step", "step", "state"]
        assert control.inner.param_groups[0]["lr"] == pytest.approx(0.5e-3)
        control.zero_grad()
        assert model.q.weight.grad is None
