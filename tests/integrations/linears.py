"""Replaced projections of a tiny model, and the float64 truth about a single one."""

import copy

import torch
from torch import Tensor, nn

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN
from hf_geoscale.integrations.weights import TokenBound, effective_weight

from ..conftest import tokens
from ..tolerances import OUTPUT_ERROR
from .effective import overflows, relative

SEPARATE = ("q_proj", "k_proj", "v_proj")


def attentions(model) -> list:
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def swap(model, make) -> nn.Module:
    """Replace q_proj, k_proj and v_proj of every layer by make(linear)."""
    for attention in attentions(model):
        for name in SEPARATE:
            setattr(attention, name, make(getattr(attention, name)))
    return model


def worst_tokens(weight: Tensor, gain: Tensor, shift: Tensor, heads: int) -> Tensor:
    """Tokens x = g∘u + β, ‖u‖ = √d, that aim at each head's largest output, at single rows, and random ones: (n, d) float64."""
    matrix = (weight.double() * gain).view(heads, -1, len(gain))
    right = torch.linalg.svd(matrix, full_matrices=False)[2][:, 0]
    rows = torch.nn.functional.normalize(matrix.flatten(0, 1), dim=-1)
    spread = torch.randn(300, len(gain), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peaked = torch.eye(len(gain), dtype=torch.float64) + 1e-3 * spread[: len(gain)]
    u = torch.cat([right, -right, rows, rows.sign(), spread, peaked])
    return torch.nn.functional.normalize(u, dim=-1) * len(gain) ** 0.5 * gain + shift


def assert_linear_certified(module, width: int, heads: int = 4, seed: int = 0) -> float:
    """The module's own forward lies within its map and excess for adversarial tokens; the largest share of the excess seen."""
    generator = torch.Generator().manual_seed(seed)
    gain = 1 + 0.5 * torch.randn(width, generator=generator)
    gain[0] = 8.0  # an outlier channel
    shift = 0.3 * torch.randn(width, generator=generator)
    out = module.out_features
    weight, bias, excess = effective_weight(module, "the layer", (out, width), gain, shift)
    x = worst_tokens(weight, gain.double(), shift.double(), heads)
    with torch.no_grad():
        # one token a call too: a tensor's scale depends on its other tokens
        computed = torch.cat([module(x.float()), *(module(row[None].float()) for row in x[:40])]).double()
    x = torch.cat([x, x[:40]])
    exact = x @ weight.double().T + (0 if bias is None else bias.double())
    token = TokenBound.of_norm(gain, shift, width, weight.device)
    rounding = ROUNDING_MARGIN * token.reach(weight.double())
    error = (computed - exact).abs()
    assert (error <= (excess if excess is not None else 0) + rounding).all()
    return float((error / (excess if excess is not None else rounding)).amax())


def assert_patched_is_close(model, make) -> None:
    """Replacing projections after patching: the next forward measures them, agrees with SDPA, and overflows nothing."""
    patch_model(model)
    swap(model, make)
    ids = tokens(2, 24)
    ours = model(ids, labels=ids)
    assert overflows(model) == 0
    assert 0 < geometry_report(model).rows[0]["utilisation"] <= 1
    if any(p.requires_grad for p in model.parameters()):
        ours.loss.backward()
    exact = unpatch_model(copy.deepcopy(model))(ids).logits
    assert relative(ours.logits.detach(), exact.detach()) < OUTPUT_ERROR
