"""What logit-change control refuses and warns of, and which parameters it controls as groups come and go."""

import math
import warnings

import pytest
import torch
from torch import nn

from hf_geoscale.stability import LogitChangeControl

from .test_quack import DIM, adamw, gradients, projections, slices_of


class TestRefusals:
    def test_what_is_no_optimizer(self):
        with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer to wrap, got Projections"):
            LogitChangeControl(projections(), slices_of(projections()))

    @pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
    def test_tau(self, tau):
        model = projections()
        with pytest.raises(ValueError, match=f"tau must be positive and finite, got {tau}"):
            LogitChangeControl(adamw(model), slices_of(model), tau=tau)

    def test_an_optimizer_of_other_weights(self):
        with pytest.raises(ValueError, match="AdamW holds none of the 2 weights and biases that make queries and keys"):
            LogitChangeControl(adamw(projections()), slices_of(projections()))

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_weights_without_a_norm(self, value):
        model = projections()
        with torch.no_grad():
            model.k.weight[:DIM] = value
        gradients(model)
        with pytest.raises(ValueError, match=f"W_Q 0 faces weights of norm {value} at the first step"):
            LogitChangeControl(adamw(model), slices_of(model)).step()

    def test_flattened_weights(self):
        model = projections()
        control = LogitChangeControl(adamw(model), slices_of(model))
        model.k.weight = nn.Parameter(model.k.weight.detach().flatten())
        with pytest.raises(ValueError, match=r"k must have 16 entries along dimension 0, its shape is now \(256,\)"):
            control.step()


def test_float32_weights_are_not_warned_of():
    model = projections().float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogitChangeControl(adamw(model), slices_of(model))


class TestGroups:
    def halved(self, control, model, still=None) -> None:
        """A step moves every controlled weight by half of what SGD does, the first factor being τ = 0.5."""
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients(model)
        control.step()
        for name, parameter in model.named_parameters():
            expected = start[name] - (0.0 if name == still else 0.5 * 1e-3) * parameter.grad
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-15)

    def test_weights_unfrozen_later_are_controlled(self):
        model = projections()
        inner = torch.optim.SGD([model.q.weight], lr=1e-3)
        control = LogitChangeControl(inner, slices_of(model), tau=0.5, adaptive=False)
        self.halved(control, model, still="k.weight")
        control.add_param_group({"params": [model.k.weight]})
        self.halved(control, model)

    def test_groups_that_are_replaced(self):
        model = projections()
        inner = torch.optim.SGD([model.q.weight], lr=1e-3)
        control = LogitChangeControl(inner, slices_of(model), tau=0.5, adaptive=False)
        control.param_groups = [control.param_groups[0] | {"params": list(model.parameters())}]
        self.halved(control, model)
        control.param_groups = [control.param_groups[0] | {"params": [nn.Parameter(torch.ones(2))]}]
        with pytest.raises(ValueError, match="SGD holds none of the 2 weights and biases that make queries and keys"):
            control.step()

    def test_norms_at_the_start_are_those_of_the_first_step(self):
        model = projections()
        control = LogitChangeControl(adamw(model.q), slices_of(model))
        start = control.factors()
        with torch.no_grad():
            model.q.weight.mul_(4.0)
        control.add_param_group({"params": [model.k.weight]})
        keys = control.factors()[-2:]
        torch.testing.assert_close(keys, start[-2:] / 4)
