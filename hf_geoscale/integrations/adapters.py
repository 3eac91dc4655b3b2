"""Effective weights of PEFT's LoRA layers: what their forward computes in the state they are in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..geometry import UNIT_ROUNDOFF
from .weights import EffectiveWeight, TokenBound, class_path, refuse_mixed_batch

_LORA_LAYERS = {
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
    "peft.tuners.lora.te.TeLinear",
}

ADAPTER_ROUNDING = 10 * UNIT_ROUNDOFF
"""Relative error of the base's and the adapter's outputs before they are added, where they may cancel: at most ten roundings
(norm, gain, dropout, casts of A and B, both products, scaling, two sums), each relative to its own term."""

MAGNITUDE_ROUNDING = 4 * UNIT_ROUNDOFF
"""Error of DoRA's m over (‖W's row‖ + s·|B|‖A's rows‖)/‖the row's norm‖·|m|: at most seven roundings, each half a unit roundoff
(casts of W, A and B, product, scaling, sum and norm together, division), the norm being 1-Lipschitz in the row."""


class _Map(NamedTuple):
    """The result so far of a LoRA layer's forward: W x + b, within `excess`. Float64."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)
    excess: Tensor  # (out,)


def is_adapter(module: Any) -> bool:
    """Whether this is a LoRA layer whose effective weight is known."""
    return class_path(module) in _LORA_LAYERS


def dropout_deviation(dropout: nn.Module) -> float:
    """max|D − I| of a dropout layer's diagonal D, entries 0 or 1/(1−p): max(1, p/(1−p)) in training, else 0."""
    p = getattr(dropout, "p", 0.0)
    if not dropout.training or p == 0:
        return 0.0
    return 1.0 if p == 1 else max(1.0, p / (1 - p))


def with_adapters(module: Any, base: EffectiveWeight, where: str, token: TokenBound) -> EffectiveWeight:
    """The map of a LoRA layer over its base's map, both (out, in), as `forward` of peft.tuners.lora computes it.

    Each active adapter adds s·B(A D x) + s·b, D the dropout. Its map is s·BA; dropout moves the output by at most
    max|D − I|·Σⱼ |(s·BA)ⱼ||xⱼ|, entry by entry. Base and adapter may cancel, so the roundings of both are added too
    (`ADAPTER_ROUNDING`), the adapter's along its way through the rank. DoRA: `_add_dora`.

    Raises:
        UnsupportedModelError: an adapter layer inside an adapter layer, another variant of LoRA, or several adapters in one
            batch (`adapter_names`).
    """
    if module.disable_adapters or module.merged:
        return base
    refuse_mixed_batch(module, where)
    _refuse_variants(module, where)
    zeros = torch.zeros(base.weight.shape[0], dtype=torch.float64, device=base.weight.device)
    fixed = _Map(
        base.weight.detach().double(),
        zeros if base.bias is None else base.bias.detach().double(),
        zeros if base.excess is None else base.excess,
    )
    result = fixed
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        add = _add_dora if name in module.lora_variant else _add_lora
        result = add(module, name, result, fixed, token)
    return EffectiveWeight(*result) if names else base


def _refuse_variants(module: Any, where: str) -> None:
    packed = getattr(getattr(module.get_base_layer().weight, "quant_state", None), "packing_format_for_cpu", False)
    if packed and any(name in module.lora_variant for name in module.active_adapters):
        raise UnsupportedModelError(
            f"{where} runs DoRA on a 4-bit base that bitsandbytes packed for CPU inference, whose codes PEFT misreads; "
            "evaluate it on a GPU, or use plain LoRA"
        )
    variants = [
        type(module.lora_variant[name]).__name__ for name in module.active_adapters if name in module.lora_variant
    ]
    unknown = [variant for variant in variants if variant != "DoraLinearVariant"]
    if unknown:
        raise UnsupportedModelError(
            f"{where} has an active {unknown[0]} of LoRA, whose effective weight this release does not certify; "
            "use plain LoRA, rsLoRA or DoRA, merge it, or unpatch the model"
        )


def _factors(module: Any, name: str, token: TokenBound) -> tuple[Tensor, Tensor, Tensor]:
    """s·BA (out, in); the bound of |s||B||A||x| through the rank (out,); |s|·|B|·‖A's rows‖ (out,). Float64."""
    a, b = (getattr(module, f"lora_{x}")[name].weight.detach().to(token.gain.device).double() for x in "AB")
    scale = module.scaling[name]
    delta = scale * (b @ a)
    spread = abs(scale) * b.abs()
    return delta, spread @ token.reach(a), spread @ a.norm(dim=-1)


def _add_lora(module: Any, name: str, result: _Map, base: _Map, token: TokenBound) -> _Map:
    delta, path, _ = _factors(module, name, token)
    dropped = dropout_deviation(module.lora_dropout[name])
    shift = module.lora_B[name].bias
    shift = torch.zeros_like(path) if shift is None else module.scaling[name] * shift.detach().to(path.device).double()
    rounding = ADAPTER_ROUNDING * (token.reach(result.weight) + result.bias.abs() + (1 + dropped) * path + shift.abs())
    excess = result.excess + rounding + (dropped * token.reach(delta) if dropped else 0)
    return _Map(result.weight + delta, result.bias + shift, excess)


def _add_dora(module: Any, name: str, result: _Map, base: _Map, token: TokenBound) -> _Map:
    """DoRA adds (m−1)·(y − b) + m·s·BA x to the result y so far, m = magnitude / ‖rows of W + s·BA‖, W and b the base's.

    With dropout in training y − b becomes W D x, of the base alone (`DoraLinearVariant.forward`). The norm is never of dropped
    weights. m is computed in the activations' dtype, from terms that may cancel in the norm (`MAGNITUDE_ROUNDING`).
    """
    delta, path, lengths = _factors(module, name, token)
    norm = (base.weight + delta).norm(dim=-1)
    m = module.lora_magnitude_vector[name].weight.detach().to(norm.device).double() / norm
    dropout = module.lora_dropout[name]
    dropped = dropout_deviation(dropout)
    undropped = isinstance(dropout, nn.Identity) or not module.training
    so_far = token.reach(result.weight) + result.bias.abs()
    scaled = so_far if undropped else (1 + dropped) * token.reach(base.weight)  # what m − 1 multiplies
    path = (1 + dropped) * path
    m_error = MAGNITUDE_ROUNDING * m.abs() * (base.weight.norm(dim=-1) + lengths) / norm
    rounding = ADAPTER_ROUNDING * (so_far + (m - 1).abs() * scaled + m.abs() * path) + m_error * (scaled + path)
    if undropped:
        weight = m[:, None] * (result.weight + delta)
        return _Map(weight, result.bias + (m - 1) * (result.bias - base.bias), m.abs() * result.excess + rounding)
    added = (m - 1)[:, None] * base.weight + m[:, None] * delta
    return _Map(result.weight + added, result.bias, result.excess + dropped * token.reach(added) + rounding)
