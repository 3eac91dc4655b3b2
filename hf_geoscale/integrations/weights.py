"""What a projection module computes: x ↦ W x + c, and how far its output can lie from that, adapters and casts included.

Everything is resolved at each refresh, so wrapping, quantising or replacing a module later is seen. Modules of optional
packages are told by the name of their class; nothing is imported for them.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .calls import check_forward, watch_hooks
from .sharding import is_partitioned, is_shard

E4M3_MAX = 448.0
E4M3_GROWTH = 1 + 2.0**-4
"""Largest |x̂|/|x| of a normal number rounded to E4M3: half of its spacing of 2⁻³."""

E4M3_SUBNORMAL_ERROR = 2.0**-9
"""Rounding error of a subnormal in units of 1/quant_scale: half a step of 2⁻⁹, twice for scales rounded to powers of two."""

SMALLEST_AMAX = 1e-12
"""torchao scales no tensor as if its largest magnitude were below this (`torchao/float8/float8_utils.py`, EPS)."""

NEAREST_GROWTH = 2.0
"""Largest |x̂|/|x| of rounding to nearest on any grid that holds 0, at any scale, saturating or not: half a step becomes one."""

HALF_STEP_BNB = 1 / 254
"""LLM.int8() rounds a row x to multiples of max|x|/127: error per entry in units of max|x|."""

STEP_TORCHAO = 1 / 127
"""A whole step instead of half: torchao's scale is itself rounded to the activation's dtype, and ±127.5 is clamped."""

_ORDINARY = (nn.Linear, Conv1D)
"""Classes that compute what their weight and bias say, where these are plain parameters."""

_MIXED_BATCH_HOOK = "_adapter_names_pre_forward_hook"

_TORCHAO_WEIGHTS = {"Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"}


def class_path(module: Any) -> str:
    """Package, module and name of an object's class, e.g. "bitsandbytes.nn.modules.Linear4bit"."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


class EffectiveWeight(NamedTuple):
    """The affine map of a module, and the bound of what it computes beyond that."""

    weight: Tensor  # as the module stores it: (out, in), a Conv1D's (in, out)
    bias: Tensor | None  # (out,)
    excess: Tensor | None = None  # (out,) float64: |output − (W x + c)| entry by entry; None: rounding to BF16 only

    @property
    def transposed(self) -> "EffectiveWeight":
        return self._replace(weight=self.weight.T)


@dataclass(frozen=True)
class TokenBound:
    """What is known of a normalised token x = g∘u + β, ‖u‖₂ ≤ √d. Float64."""

    gain: Tensor  # (d,) g
    shift: Tensor  # (d,) β

    @classmethod
    def of_norm(cls, gain: Tensor | None, shift: Tensor | None, width: int, device: torch.device) -> "TokenBound":
        """From a norm layer's gain and shift; without one, 1 and 0."""
        ones = torch.ones(width, dtype=torch.float64, device=device)
        gain = ones if gain is None else gain.detach().to(device).double()
        return cls(gain, 0 * ones if shift is None else shift.detach().to(device).double())

    def reach(self, rows: Tensor) -> Tensor:
        """Bound of Σⱼ |rowⱼ||xⱼ| ≤ √d·‖row∘g‖₂ + Σⱼ |rowⱼ||βⱼ|, by Cauchy–Schwarz: (n, d) → (n,)."""
        return math.sqrt(rows.shape[-1]) * (rows * self.gain).norm(dim=-1) + rows.abs() @ self.shift.abs()

    @property
    def peak(self) -> Tensor:
        """Bound of max |xⱼ|: ()."""
        return math.sqrt(len(self.gain)) * self.gain.abs().amax() + self.shift.abs().amax()

    @property
    def total(self) -> Tensor:
        """Bound of Σⱼ |xⱼ| ≤ √d·‖g‖₂ + ‖β‖₁: ()."""
        return math.sqrt(len(self.gain)) * self.gain.norm() + self.shift.abs().sum()


def active_module(module: Any) -> Any:
    """The module that runs where PEFT keeps several (`modules_to_save`); any other module itself."""
    if type(module) in _ORDINARY or class_path(module) != "peft.utils.other.ModulesToSaveWrapper":
        return module
    refuse_mixed_batch(module, f"a module of modules_to_save ({type(module.original_module).__name__})")
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module.modules_to_save for name in active):
        return module.original_module
    return module.modules_to_save[active[0]]


def refuse_mixed_batch(module: Any, where: str) -> None:
    """Raise UnsupportedModelError while PEFT runs several adapters in one batch; it passes them by hooks of one forward."""
    hooks = [getattr(hook, "func", hook) for hook in module._forward_pre_hooks.values()]
    if any(getattr(hook, "__name__", "") == _MIXED_BATCH_HOOK for hook in hooks):
        raise UnsupportedModelError(
            f"{where} runs several adapters in one batch (adapter_names), which one certificate cannot cover; "
            "call the model once per adapter, or unpatch it"
        )


def effective_weight(
    module: Any,
    where: str,
    shape: tuple[int, int],
    gain: Tensor | None,  # (d,) of the norm before it
    shift: Tensor | None,  # (d,)
) -> EffectiveWeight:
    """The map a projection computes now, in training or evaluation mode as it is.

    Args:
        where: names the module in messages.
        shape: of the weight, as an unquantised module stores it.
    Raises:
        UnsupportedModelError: a module that hides its effective weight, or a weight of another shape.
    """
    inner = active_module(module)
    for part in {id(m): m for m in (module, inner, getattr(inner, "base_layer", inner))}.values():
        check_forward(part, where)
        refuse_reparametrised(part, where)
        watch_hooks(part, where)
    if (found := _whole_parameters(module)) is not None:
        return _of_shape(found, shape, where)
    module = inner
    if type(module) in _ORDINARY and type(module.weight) is nn.Parameter:
        return _of_shape(_plain_weight(module, where), shape, where)  # neither adapters nor casts
    from .adapters import is_adapter, with_adapters  # it needs this module

    base = module.base_layer if is_adapter(module) else module
    plain = _of_shape(_plain_weight(base, where), shape, where)
    swap = type(base) is Conv1D
    rows = plain.transposed if swap else plain
    token = TokenBound.of_norm(gain, shift, rows.weight.shape[1], rows.weight.device)
    # What is dequantised to BF16 may run unrounded; only a float32 weight is measured with room for a cast of its own.
    weight = rows.weight.detach().to(torch.promote_types(rows.weight.dtype, torch.float32))
    rows = rows._replace(weight=weight, excess=_cast_excess(base, rows.weight, token, where))
    if is_adapter(module):
        rows = with_adapters(module, rows, where, token)
    return rows.transposed if swap else rows


_REPARAMETRISED = {"weight_mask": "prune", "weight_g": "weight_norm", "weight_u": "spectral_norm"}
"""Parameters and buffers that torch.nn.utils leaves in a module, and the function that did."""


def refuse_reparametrised(module: Any, where: str) -> None:
    """Raise UnsupportedModelError for a weight that torch.nn.utils computes anew in each forward."""
    if (parametrized := getattr(module, "parametrizations", None)) is not None:
        kinds = sorted({type(part).__name__.strip("_") for parts in parametrized.values() for part in parts})
        raise UnsupportedModelError(
            f"{where} has a weight that torch.nn.utils.parametrize computes anew in each forward ({', '.join(kinds)}); no "
            "certificate follows it. Make it permanent with torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), "
            "or unpatch the model"
        )
    if "weight" not in module.__dict__:
        return
    for name, function in _REPARAMETRISED.items():
        if name in module._parameters or name in module._buffers:
            undo = "prune.remove(module, 'weight')" if function == "prune" else f"remove_{function}(module)"
            raise UnsupportedModelError(
                f"{where} has a weight that torch.nn.utils.{function} computes anew in each forward; no certificate follows it. "
                f"Make it permanent first (torch.nn.utils.{undo}), or unpatch the model"
            )


def _of_shape(found: EffectiveWeight, shape: tuple[int, int], where: str) -> EffectiveWeight:
    if tuple(found.weight.shape) != shape:
        raise UnsupportedModelError(f"{where} must have a weight of shape {shape}, got {tuple(found.weight.shape)}")
    return found


def _whole_parameters(module: Any) -> EffectiveWeight | None:
    """Weight and bias of the ordinary case, where `_plain_weight` has nothing to refuse (no mark on the parameter), else None."""
    if type(module) not in _ORDINARY:
        return None
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or vars(weight) or weight.is_meta:
        return None
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return None
    return EffectiveWeight(weight, module._parameters["bias"]) if "bias" in module._parameters else None


def _plain_weight(module: Any, where: str) -> EffectiveWeight:
    """Weight and bias of a module without adapters, once it is sure that they are the effective ones."""
    ordinary = type(module) in _ORDINARY
    path = "" if ordinary else class_path(module)
    bias = getattr(module, "bias", None)
    if not ordinary and hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__} adapter, whose effective weight this release does not certify; "
            "merge it first (model.merge_and_unload()) or unpatch the model"
        )
    if path.startswith("bitsandbytes."):
        return EffectiveWeight(_dequantised_bitsandbytes(module, where), bias)
    if path in _FLOAT8_LINEARS:
        bias = None if bias is None or not bias.numel() else bias
    elif not ordinary:
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__}; only nn.Linear and Conv1D, and the linears of LoRA, bitsandbytes, "
            "torchao and Transformer Engine, are sure to compute what their weight says"
        )
    weight: Any = module.weight
    if type(weight).__module__.startswith("torchao."):
        return EffectiveWeight(_dequantised_torchao(weight, where), bias)
    absent = is_partitioned(weight) and weight.ds_status.name != "AVAILABLE"
    if weight.is_meta and hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"{where} is offloaded by accelerate, which brings its weight back in that projection's forward alone. Offload whole "
            "decoder layers: pass their class to cpu_offload, disk_offload or dispatch_model, such as "
            "preload_module_classes=['LlamaDecoderLayer']"
        )
    if absent or is_shard(weight) or weight.is_meta:
        raise UnsupportedModelError(
            f"{where} is {'partitioned by DeepSpeed ZeRO-3' if absent else 'sharded or on the meta device'}; "
            "patch the model where its weights are whole"
        )
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnsupportedModelError(
            f"{where} keeps its weight as a {type(weight).__name__}, whose values we cannot read"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{where} holds {weight.dtype} weights; load the model in bfloat16, float16 or float32"
        )
    return EffectiveWeight(weight, bias)


def _dequantised_bitsandbytes(module: Any, where: str) -> Tensor:
    """(out, in) of a bitsandbytes Linear4bit (NF4, FP4, double quantisation) or Linear8bitLt."""
    weight = module.weight
    if hasattr(module, "state"):  # Linear8bitLt; its first forward moves CB and SCB from the weight to the state
        codes = weight.CB if getattr(weight, "CB", None) is not None else module.state.CB
        row_amax = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
        if module.state.has_fp16_weights or codes is None or row_amax is None:
            raise UnsupportedModelError(
                f"{where} is a {type(module).__name__} that quantises its weight anew at each forward; use has_fp16_weights=False "
                "and move the model to its device before patching"
            )
        return codes.double() * (row_amax.double() / 127).to(codes.device)[:, None]
    state = getattr(weight, "quant_state", None)
    if type(weight).__name__ != "Params4bit" or state is None:
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__} whose weight is not quantised yet; move the model to its device before patching"
        )
    from bitsandbytes import functional

    codes = weight.data
    if getattr(state, "packing_format_for_cpu", False):  # by its first evaluation on a CPU with AVX-512 BF16
        absmax, state = state.absmax, copy.copy(state)
        state.original_nested = False  # the packed scales are plain; quantising them again would change them
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = absmax.T.reshape(-1).float()
    return functional.dequantize_4bit(codes, state).detach()


def _dequantised_torchao(weight: Any, where: str) -> Tensor:
    """(out, in) of a torchao weight whose activations stay as they are or are quantised dynamically by row or tensor."""
    name = type(weight).__name__
    static = [
        a
        for a in ("act_quant_scale", "act_pre_scale", "activation_quantization")
        if getattr(weight, a, None) is not None
    ]
    if name not in _TORCHAO_WEIGHTS or static:
        raise UnsupportedModelError(
            f"{where} keeps its weight as torchao's {name}{f' with {static[0]}' if static else ''}, whose products this release "
            f"does not certify; supported: {', '.join(sorted(_TORCHAO_WEIGHTS))} with weight-only or dynamic symmetric quantisation"
        )
    return weight.dequantize().detach()


def _cast_excess(module: Any, weight: Tensor, token: TokenBound, where: str) -> Tensor | None:
    """Bound of what a module's own casts of activations and weights change in each output: (out,) float64, or None.

    Rounding and the truncation inside FP8 matrix units keep the sign of each product ŵⱼx̂ⱼ = θ·wⱼxⱼ, θ from 0 (truncated) to
    growth², hence |ŷ − y| ≤ max(1, growth² − 1)·Σ|wⱼ||xⱼ|, plus what subnormals add. See the functions below.
    """
    if type(module).__name__ == "Linear8bitLt":
        return HALF_STEP_BNB * weight.double().abs().sum(1) * token.peak  # Σⱼ |wⱼ||x̂ⱼ − xⱼ|
    if class_path(module) in _FLOAT8_LINEARS:
        return _FLOAT8_LINEARS[class_path(module)](module, weight.detach().double(), token, where)
    quantised = getattr(module.weight, "act_quant_kwargs", None)
    if quantised is None:
        return None
    if type(module.weight).__name__ == "Float8Tensor":  # ŵ = w; x̂ between 0 and 2x
        return (NEAREST_GROWTH - 1) * token.reach(weight.double())
    mapping = getattr(getattr(quantised, "mapping_type", None), "name", "unknown")
    if mapping != "SYMMETRIC":
        raise UnsupportedModelError(
            f"{where} quantises activations with {mapping} mapping; only SYMMETRIC is certified"
        )
    return STEP_TORCHAO * weight.double().abs().sum(1) * token.peak


def _torchao_excess(module: Any, weight: Tensor, token: TokenBound, where: str) -> Tensor:
    """torchao.float8: dynamic E4M3 casts of x and W, |x̂| ≤ growth·|x| + η_x, |ŵ| ≤ growth·|w| + η_w, never saturating.

    η = subnormal error·max/448 with the maximum over the tensor, which no row's exceeds: max|x| ≤ `token.peak`. The products
    gain growth·(|w|η_x + η_w|x|) + η_w η_x over growth²·|w||x|. Fast accumulation truncates: θ ≥ 0.
    """
    config = module.config
    formats = {config.cast_config_input.target_dtype, config.cast_config_weight.target_dtype}
    if formats != {torch.float8_e4m3fn}:
        raise UnsupportedModelError(f"{where} casts to {', '.join(map(str, formats))}; only float8_e4m3fn is certified")
    unit = E4M3_SUBNORMAL_ERROR / E4M3_MAX
    eta_x, eta_w = unit * token.peak.clamp_min(SMALLEST_AMAX), unit * weight.abs().amax().clamp_min(SMALLEST_AMAX)
    products = max(1.0, E4M3_GROWTH**2 - 1) * token.reach(weight)
    subnormal = E4M3_GROWTH * (eta_x * weight.abs().sum(1) + eta_w * token.total) + weight.shape[1] * eta_w * eta_x
    return products + subnormal


def _transformer_engine_excess(module: Any, weight: Tensor, token: TokenBound, where: str) -> Tensor:
    """Transformer Engine: casts of x and W with scales of earlier steps, which may saturate or round to subnormals.

    θ ≤ 2·2 whatever the scales are (`NEAREST_GROWTH`), so the bound needs none of them.
    """
    return (NEAREST_GROWTH**2 - 1) * token.reach(weight)


_FLOAT8_LINEARS = {
    "torchao.float8.float8_linear.Float8Linear": _torchao_excess,
    "transformer_engine.pytorch.module.linear.Linear": _transformer_engine_excess,
}
