"""QuacK on DeepSeek's latent attention: the norms on the latents hide the sizes of W_DQ and W_DKV from the logits."""

import pytest
import torch
from torch import nn

from hf_geoscale import QuacK
from hf_geoscale.integrations.logit_weights import logit_weights

from .test_quack import Logits, build

WEIGHTS = ["W_DQ", "W_DKV", "W_UQ", "W_UK"]
LEARNING_RATE = 1e-7
"""The second-order part of ΔL is about this over the weights' size, 2e-3 where they shrank by 10, times the first."""


def rows_of(model: nn.Module, name: str) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters of layer 0 that hold this weight, and the mask of its rows, (rows, 1)."""
    weights, _ = logit_weights(model)
    slots = [slot for slot, full in enumerate(weights.names) if full.startswith(f"layer 0, {name}")]
    masks = [(w.parameter, torch.isin(w.labels, torch.tensor(slots))[:, None]) for w in weights.weights]
    return [(parameter, mask) for parameter, mask in masks if mask.any()]


def change(updated: str, scaled: str, factor: float, rules: str) -> torch.Tensor:
    """ΔL (B, Hq, L, L) of one AdamW step of one weight in float64, after another was multiplied by `factor`."""
    model, logits = build("deepseek_v3").double(), Logits()
    attention = model.model.layers[0].self_attn
    for name in ("q_a_layernorm", "kv_a_layernorm"):  # transformers' own computes in float32
        setattr(attention, name, nn.RMSNorm(getattr(attention, name).weight.shape[0], eps=0.0).double())
    if updated == "W_DQ":  # reaches the logits with RoPE too, and follows the larger of both parts
        for parameter, mask in rows_of(model, "W_KR"):
            parameter.data.mul_(torch.where(mask, 1e-6, 1.0))
    ((target, mask),) = rows_of(model, updated)
    control = QuacK(torch.optim.AdamW([target], lr=LEARNING_RATE, weight_decay=0.0), model, latent_rules=rules)
    control.factors()  # takes the norms at the start
    for parameter, rows in rows_of(model, scaled):
        parameter.data.mul_(torch.where(rows, factor, 1.0))
    direction = torch.randn(target.shape, dtype=target.dtype, generator=torch.Generator().manual_seed(1))
    target.grad = direction * mask
    model.set_attn_implementation("logits")
    before = logits.record(model)
    control.step()
    return logits.record(model) - before


@pytest.mark.parametrize("updated", [*WEIGHTS, "W_QR", "W_KR"])
def test_change_of_the_logits_does_not_depend_on_the_size_of_any_weight(updated):
    reference = change(updated, updated, 1.0, "normalised").norm()
    for scaled in WEIGHTS:
        for factor in (0.1, 10.0):
            ratio = float(change(updated, scaled, factor, "normalised").norm() / reference)
            assert ratio == pytest.approx(1, abs=1e-3), scaled


@pytest.mark.parametrize(("updated", "scaled"), [("W_UQ", "W_DQ"), ("W_UK", "W_DKV"), ("W_QR", "W_DQ")])
def test_the_published_rules_take_it_for_growth(updated, scaled):
    reference = change(updated, scaled, 1.0, "published").norm()
    shrunk = change(updated, scaled, 0.1, "published").norm()
    assert float(shrunk / reference) == pytest.approx(10, rel=1e-2)


def test_a_first_step_is_the_inner_optimizers():
    model = build("deepseek_v3")
    factors = QuacK(torch.optim.AdamW(model.parameters()), model).factors()
    torch.testing.assert_close(factors, torch.ones_like(factors))


def test_unknown_rules():
    model = build("deepseek_v3")
    with pytest.raises(ValueError, match="latent_rules must be 'normalised' or 'published', got 'seen'"):
        QuacK(torch.optim.AdamW(model.parameters()), model, latent_rules="seen")
