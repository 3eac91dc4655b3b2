"""Forwards that hand the projections' raw output to FP8 attention, which applies RoPE, and Qwen3's norms, as it quantises.

Transformers' own forwards rotate q and k in about ten elementwise passes over memory, and autograd keeps what they return. These do
what the originals do, without those passes. `patch_model` gives them to single attention modules; a call that they do not serve
(one that reads a cache) goes through the original forward and the attention interface.
"""

import inspect
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.checks import SMALLEST_NORMAL
from ..kernels.qk_norm import QKNorm, rms_norm
from ..kernels.rotary import rotate
from ..registration import NAME
from .implementation import notice_another
from .keywords import CACHE_NAMES, cache_of
from .layer import GeoScaleLayer
from .projections import is_bare, project


def _is_patched(attention: Any) -> bool:
    patched = isinstance(attention.__dict__.get("geoscale"), GeoScaleLayer)
    return patched and attention.config._attn_implementation == NAME


def _is_only_filled(attention: Any, past: Any) -> bool:
    """Whether this call does no more with a cache than fill it: the one that models make for themselves in training, unasked."""
    training = attention.training and torch.is_grad_enabled()
    return training and type(past).__name__ == "DynamicCache" and past.get_seq_length(attention.layer_idx) == 0


def _attend(attention: Any, operands: Iterable[Tensor], mask: Tensor | None, **options) -> Tensor:
    """O of q, k and v (B, L, H, D), as (B, L, Hq·D)."""
    heads_first = (x.transpose(1, 2) for x in operands)
    out, _ = ALL_ATTENTION_FUNCTIONS[NAME](attention, *heads_first, mask, **options)
    return out.flatten(2)


def _halves(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels take them, (B or 1, L, R/2): transformers repeats the angles of channels d as those of d + R/2."""
    cos, sin = position_embeddings
    return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]


_RMS_NORMS = frozenset(("Qwen3RMSNorm", "Qwen3MoeRMSNorm", "Dots1RMSNorm", "MellumRMSNorm"))
"""Classes whose forward is `kernels.qk_norm.rms_norm`."""


def _is_plain_norm(norm: Any) -> bool:
    """Whether a call of this module runs transformers' own forward of an RMS norm and nothing around it, hook or wrapper."""
    kind = type(norm)
    return (
        kind.__name__ in _RMS_NORMS
        and kind.__module__.startswith("transformers.")
        and _origin(kind.forward).startswith("transformers.")
        and is_bare(norm)
    )


def _qk_norm(attention: Any) -> QKNorm | None:
    """(weight of q's norm, weight of k's norm, ε), where kernels can take the norms over; None where the modules have to run."""
    q_norm, k_norm = attention.q_norm, attention.k_norm
    if not (_is_plain_norm(q_norm) and _is_plain_norm(k_norm)):
        return None
    eps = q_norm.variance_epsilon
    return (q_norm.weight, k_norm.weight, eps) if eps == k_norm.variance_epsilon >= SMALLEST_NORMAL else None


class FusedForward:
    """What replaces `forward` of one attention module: an object, so that copying and pickling the model take it along.

    Calls that `serves` declines, and those with more than the hidden states by position, run the forward of the module's class.
    """

    def __init__(self, attention: Any):
        self._attention = ref(attention)  # which holds this: a reference that kept it alive would close a cycle

    @property
    def attention(self) -> Any:
        return self._attention()

    def __reduce__(self) -> tuple:
        return type(self), (self.attention,)

    def __call__(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        attention = self.attention
        if len(args) > 1 or not _is_patched(attention) or not self.serves(kwargs):
            notice_another(attention, kwargs.get("attention_mask"))
            return type(attention).forward(attention, *args, **kwargs)
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        past = cache_of(kwargs)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        return self.fused(hidden_states, past, **kwargs), None

    def serves(self, call: dict[str, Any]) -> bool:
        """Whether the fused forward does what this call asks for."""
        past = cache_of(call)
        return past is None or _is_only_filled(self.attention, past)

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        raise NotImplementedError


class LlamaForward(FusedForward):
    """Of LlamaAttention."""

    def serves(self, call: dict[str, Any]) -> bool:
        angles = call.get("position_embeddings")
        return angles is not None and angles[0].shape[-1] == self.attention.head_dim and super().serves(call)

    def window(self) -> int | None:
        """The sliding window that the class's own forward passes on."""
        return None

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        module, mask = self.attention, kwargs.pop("attention_mask", None)
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        rows: Any = project(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
        query, key, value = rows[0].view(shape), rows[1].view(shape), rows[2].view(shape)
        qk_norm = None
        if hasattr(module, "q_norm"):
            qk_norm = _qk_norm(module)
            if qk_norm is None:
                query, key, rows = module.q_norm(query), module.k_norm(key), None
        rotary = _halves(kwargs.pop("position_embeddings"))
        if past is not None:
            keys = key if qk_norm is None else rms_norm(key, *qk_norm[1:]).to(key.dtype)
            past.update(rotate(keys.transpose(1, 2), *rotary), value.transpose(1, 2), module.layer_idx)
        kwargs["dropout"] = module.attention_dropout if module.training else 0.0
        kwargs |= {"scaling": module.scaling, "sliding_window": self.window(), "rotary": rotary}
        kwargs |= {"qk_norm": qk_norm, "packed": rows}
        return module.o_proj(_attend(module, (query, key, value), mask, **kwargs))


class MistralForward(LlamaForward):
    """Of MistralAttention."""

    def window(self) -> int | None:
        return getattr(self.attention.config, "sliding_window", None)


class QwenForward(LlamaForward):
    """Of Qwen2Attention and Qwen3Attention, and of classes with the latter's code under other names."""

    def window(self) -> int | None:
        return self.attention.sliding_window


class GPT2Forward(FusedForward):
    """Of GPT2Attention, without cross-attention: c_attn's output goes in undivided, and gets one gradient."""

    def serves(self, call: dict[str, Any]) -> bool:
        return call.get("encoder_hidden_states") is None and super().serves(call)

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        module, mask = self.attention, kwargs.pop("attention_mask", None)
        for name in ("cache_position", "encoder_hidden_states", "encoder_attention_mask", "output_attentions"):
            kwargs.pop(name, None)  # the original does not pass them on either
        packed = module.c_attn(hidden_states)
        parts = packed.unflatten(2, (-1, module.head_dim)).split(module.num_heads, dim=2)
        if past is not None:
            past.update(parts[1].transpose(1, 2), parts[2].transpose(1, 2), module.layer_idx)
        kwargs |= {"dropout": module.attn_dropout.p if module.training else 0.0, "packed": packed}
        return module.resid_dropout(module.c_proj(_attend(module, parts, mask, **kwargs)))


FORWARDS: dict[str, type[FusedForward]] = {
    "LlamaAttention": LlamaForward,
    "MistralAttention": MistralForward,
    "Qwen2Attention": QwenForward,
    "Qwen3Attention": QwenForward,
    "Qwen3MoeAttention": QwenForward,
    "Dots1Attention": QwenForward,
    "MellumAttention": QwenForward,
    "GPT2Attention": GPT2Forward,
}
"""By the name of the attention class in transformers."""


def why_not(layer: GeoScaleLayer) -> str | None:
    """Why a layer's calls go through the attention interface; None where they need not."""
    attention, config = layer.site.attention, layer.config
    if not config.fused_front_end:
        return "fused_front_end=False"
    if config.scaling != "geometry":
        return f"scaling={config.scaling!r} looks at rotated queries and keys"
    if config.span_scaling is not None and not config.span_scaling.is_identity:
        return "span scaling looks at rotated queries and keys"
    kind = type(attention)
    if kind.__name__ not in FORWARDS or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} has no fused forward"
    own = attention.__dict__.get("forward")
    if own is not None and not isinstance(own, FusedForward):
        return f"{_origin(own)} wrapped or replaced its forward"
    if not _origin(kind.forward).startswith("transformers."):
        return f"{_origin(kind.forward)} replaced its forward"
    rotates = inspect.unwrap(kind.forward).__globals__.get("apply_rotary_pos_emb")
    if rotates is not None and not _origin(rotates).startswith(("transformers.", "liger_kernel.")):
        return f"{_origin(rotates)} replaced apply_rotary_pos_emb"
    for rotary in layer.site.rotary:
        if not type(rotary).__module__.startswith("transformers."):
            return f"its {type(rotary).__name__} is not of transformers"
    return None


def _origin(function: Any) -> str:
    """The Python module whose code runs; `functools.wraps` copies everything but a function's globals."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def install(layer: GeoScaleLayer) -> None:
    """Give the layer's attention module its fused forward, where there is one for it; `layer.front_end` says what became of it."""
    attention, reason = layer.site.attention, why_not(layer)
    layer.front_end = reason or "fused"
    if reason is None:
        attention.forward = FORWARDS[type(attention).__name__](attention)


def remove(attention: Any) -> None:
    """Take the fused forward away. Where somebody has wrapped it since, it stays, and calls the original."""
    if isinstance(attention.__dict__.get("forward"), FusedForward):
        del attention.forward
