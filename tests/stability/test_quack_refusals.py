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
