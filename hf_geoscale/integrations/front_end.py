"""Forwards that hand the projections' raw output to FP8 attention, which applies RoPE as it quantises.

Transformers' own forwards rotate q and k in about ten elementwise passes over memory, and autograd keeps what they return. These do
what the originals do, without those passes. `patch_model` gives them to single attention modules; a call that they do not serve
(one with a cache) goes through the original forward and the attention interface.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer import GeoScaleLayer

NAME = "geoscale"
"""The attention implementation's name in transformers, on the attention and on the mask interface."""


def _serves(attention: Any, past: object) -> bool:
    """Whether a call runs here."""
    patched = isinstance(attention.__dict__.get("geoscale"), GeoScaleLayer)
    return patched and past is None and attention.config._attn_implementation == NAME


def _attend(attention: Any, operands: Iterable[Tensor], mask: Tensor | None, **options) -> Tensor:
    """O of q, k and v (B, L, H, D), as (B, L, Hq·D)."""
    heads_first = (x.transpose(1, 2) for x in operands)
    out, _ = ALL_ATTENTION_FUNCTIONS[NAME](attention, *heads_first, mask, **options)
    return out.flatten(2)


def _halves(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels take them, (B or 1, L, R/2): transformers repeats the angles of channels d as those of d + R/2."""
    cos, sin = position_embeddings
    return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]


def _window(attention: Any) -> int | None:
    """The sliding window that the class's own forward would pass on."""
    if hasattr(attention, "sliding_window"):  # Qwen2, Qwen3: of this layer
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)  # Mistral; Llama has none


class FusedForward:
    """What replaces `forward` of one attention module: an object, so that copying and pickling the model take it along."""

    def __init__(self, attention: Any):
        self.attention = attention

    def original(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """The forward of the module's class."""
        return type(self.attention).forward(self.attention, *args, **kwargs)


class LlamaForward(FusedForward):
    """Of LlamaAttention, MistralAttention, Qwen2Attention and Qwen3Attention."""

    def __call__(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        module = self.attention
        if position_embeddings is None or not _serves(module, past_key_values):
            return self.original(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        query, key, value = (proj(hidden_states).view(shape) for proj in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        kwargs["dropout"] = module.attention_dropout if module.training else 0.0
        kwargs |= {"scaling": module.scaling, "sliding_window": _window(module)}
        out = _attend(module, (query, key, value), attention_mask, rotary=_halves(position_embeddings), **kwargs)
        return module.o_proj(out), None


class GPT2Forward(FusedForward):
    """Of GPT2Attention, without cross-attention: c_attn's output goes in undivided, and gets one gradient."""

    def __call__(
        self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        module = self.attention
        if encoder_hidden_states is not None or not _serves(module, past_key_values):
            return self.original(
                hidden_states,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                **kwargs,
            )
        for name in ("cache_position", "encoder_attention_mask", "output_attentions"):
            kwargs.pop(name, None)  # the original does not pass them on either
        packed = module.c_attn(hidden_states)
        parts = packed.unflatten(2, (-1, module.head_dim)).split(module.num_heads, dim=2)
        dropout = module.attn_dropout.p if module.training else 0.0
        out = _attend(module, parts, attention_mask, dropout=dropout, packed=packed, **kwargs)
        return module.resid_dropout(module.c_proj(out)), None


FORWARDS: dict[str, type[FusedForward]] = {
    "LlamaAttention": LlamaForward,
    "MistralAttention": LlamaForward,
    "Qwen2Attention": LlamaForward,
    "Qwen3Attention": LlamaForward,
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
    kind = type(attention)
    if kind.__name__ not in FORWARDS or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} has no fused forward"
    replaced = attention.__dict__.get("forward") or kind.forward
    origin = getattr(replaced, "__module__", None) or type(replaced).__module__
    if not origin.startswith("transformers."):
        return f"{origin} replaced its forward"
    return None


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
