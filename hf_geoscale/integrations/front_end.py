"""Forwards that hand the projections' raw output to FP8 attention, which applies RoPE, and Qwen3's norms, as it quantises.

Transformers' own forwards rotate q and k in about ten elementwise passes over memory, and autograd keeps what they return. These do
what the originals do, without those passes. `patch_model` gives them to single attention modules whose class's forward is one that
they were written for (`recognition`); a call that they do not serve (one that reads a cache, or has a keyword that is not known)
goes through the original forward and the attention interface.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.checks import SMALLEST_NORMAL
from ..kernels.qk_norm import QKNorm, rms_norm
from ..kernels.rotary import rotate
from ..registration import NAME
from . import recognition
from .implementation import notice_another
from .keywords import CACHE_NAMES, cache_of, unknown_keywords
from .layer import GeoScaleLayer
from .projections import heads_first, is_bare, project
from .refresh import RefreshGroup
from .upstream import warn_of_missing

FUSED = "fused"
"""`GeoScaleLayer.front_end` of a layer with a fused forward; any other says why it has none."""

logger = logging.getLogger(__name__)

_warned: WeakKeyDictionary[RefreshGroup, set[str]] = WeakKeyDictionary()
"""What was said of each model already."""


def _is_patched(attention: Any) -> bool:
    """Whether this module carries our state, and its own config says that our attention is to run."""
    own = attention.__dict__
    if "geoscale" not in own or not isinstance(own["geoscale"], GeoScaleLayer) or "config" not in own:
        return False
    try:
        return own["config"]._attn_implementation == NAME
    except AttributeError:  # no config of transformers
        return False


def _is_only_filled(attention: Any, past: Any) -> bool:
    """Whether this call does no more with a cache than fill it: the one that models make for themselves in training, unasked."""
    if not (attention.training and torch.is_grad_enabled() and recognition.fills_plainly(past, attention.layer_idx)):
        return False
    return past.get_seq_length(attention.layer_idx) == 0


def fill_cache(attention: Any, past: Any, key: Tensor, value: Tensor, rotary: Any, qk_norm: QKNorm | None) -> None:
    """Hand a cache that a call only fills the keys, normalised and rotated, and the values: (B, Hkv, L, D) each."""
    if qk_norm is not None:
        key = rms_norm(key, *qk_norm[1:]).to(key.dtype)
    past.update(key if rotary is None else rotate(key, *rotary), value, attention.layer_idx)


def _attend(
    attention: Any, heads: Any, mask: Tensor | None, packed: Any, past: Any, traced: bool = False, **options
) -> Tensor:
    """O, (B, L, Hq·D), of q, k and v (B, H, L, D), or where these are None of their projections, `packed`. Fills the cache.

    A traced call ends the compiler's graph with the projections. The attention function views them by heads, and fills the cache:
    a graph that gave a projection and a view of it would make torch 2.9 to 2.13 read freed memory (docs/freed_memory.md).
    """
    if heads is None and traced:
        heads = packed if type(packed) is tuple else (packed, packed, packed)
        options["past"] = past
    else:
        heads = heads or heads_first(packed, attention.head_dim)
        if past is not None:
            fill_cache(attention, past, heads[1], heads[2], options.get("rotary"), options.get("qk_norm"))
    out, _ = ALL_ATTENTION_FUNCTIONS[NAME](attention, *heads, mask, packed=packed, traced=traced, **options)
    return out.flatten(2)


def _halves(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels take them, (B or 1, L, R/2): transformers repeats the angles of channels d as those of d + R/2."""
    cos, sin = position_embeddings
    return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]


def _is_plain_norm(norm: Any) -> bool:
    """Whether a call of this module runs an RMS norm as our kernels compute it, and nothing around it, hook or wrapper."""
    return recognition.is_known_norm(norm) and is_bare(norm)


def _qk_norm(attention: Any) -> QKNorm | None:
    """(weight of q's norm, weight of k's norm, ε), where kernels can take the norms over; None where the modules have to run."""
    q_norm, k_norm = attention.q_norm, attention.k_norm
    if not (_is_plain_norm(q_norm) and _is_plain_norm(k_norm)):
        return None
    eps = q_norm.variance_epsilon
    return (q_norm.weight, k_norm.weight, eps) if eps == k_norm.variance_epsilon >= SMALLEST_NORMAL else None


class FusedForward:
    """What replaces `forward` of one attention module: an object, so that copying and pickling the model take it along.

    Calls that `serves` declines, those with more than the hidden states by position, and all calls while upstream's code is other
    than what this was written for run the forward of the module's class.
    """

    keywords = frozenset((*CACHE_NAMES, "hidden_states", "attention_mask", "is_causal"))
    """What the fused forward reads. Any other keyword, unless it is ignorable, is for the class's own forward to understand."""

    rotates = False
    """Whether the class's own forward rotates queries and keys."""

    def __init__(self, attention: Any):
        self._attention = ref(attention)  # which holds this: a reference that kept it alive would close a cycle

    @property
    def attention(self) -> Any:
        return self._attention()

    def __reduce__(self) -> tuple:
        return type(self), (self.attention,)

    def __call__(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        attention, traced = self.attention, torch.compiler.is_compiling()
        if args[1:] or not (_is_patched(attention) and self.serves(kwargs) and self._is_recognised(attention, traced)):
            notice_another(attention, kwargs.get("attention_mask"))
            return type(attention).forward(attention, *args, **kwargs)
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        past = cache_of(kwargs)
        for name in CACHE_NAMES:
            if name in kwargs:
                kwargs.pop(name)
        if traced:
            kwargs["traced"] = True
        return self.fused(hidden_states, past, **kwargs), None

    def _is_recognised(self, attention: Any, traced: bool) -> bool:
        """Whether upstream's code is still known; `layer.front_end` says what is not, and a warning, once a model.

        A compiler takes what was true of the last call. The attention function, which it leaves to Python, looks again.
        """
        layer = attention.geoscale
        if traced:
            return layer.front_end == FUSED
        unknown = recognition.unknown_code(attention, layer.site.rotary, self.rotates)
        if layer.front_end != (unknown or FUSED):
            look_again(attention, layer)
        return unknown is None

    @classmethod
    def unknown(cls, attention: Any, rotary: Sequence[Any]) -> str | None:
        """What upstream code is not what this was written for, in words; None where all of it is."""
        return recognition.unknown_code(attention, rotary, cls.rotates)

    def serves(self, call: dict[str, Any]) -> bool:
        """Whether the fused forward does what this call asks for."""
        if unknown_keywords(call, self.keywords):
            return False
        past = cache_of(call)
        return past is None or _is_only_filled(self.attention, past)

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        raise NotImplementedError


class LlamaForward(FusedForward):
    """Of LlamaAttention."""

    keywords = FusedForward.keywords | {"position_embeddings"}
    rotates = True
    normalises = False
    """Whether the class's own forward has a norm of each head's q and k."""

    def serves(self, call: dict[str, Any]) -> bool:
        angles = call.get("position_embeddings")
        return angles is not None and angles[0].shape[-1] == self.attention.head_dim and super().serves(call)

    def window(self) -> int | None:
        """The sliding window that the class's own forward passes on."""
        return None

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        module, mask = self.attention, kwargs.pop("attention_mask", None)
        rows: Any = project(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
        heads = qk_norm = None
        if self.normalises:
            qk_norm = _qk_norm(module)
            if qk_norm is None:
                query, key, value = heads_first(rows, module.head_dim)
                heads, rows = (module.q_norm(query), module.k_norm(key), value), None
        rotary = _halves(kwargs.pop("position_embeddings"))
        kwargs["dropout"] = module.attention_dropout if module.training else 0.0
        kwargs |= {"scaling": module.scaling, "sliding_window": self.window(), "rotary": rotary, "qk_norm": qk_norm}
        return module.o_proj(_attend(module, heads, mask, rows, past, **kwargs))


class MistralForward(LlamaForward):
    """Of MistralAttention."""

    def window(self) -> int | None:
        return getattr(self.attention.config, "sliding_window", None)


class QwenForward(LlamaForward):
    """Of Qwen2Attention."""

    def window(self) -> int | None:
        return self.attention.sliding_window


class Qwen3Forward(QwenForward):
    """Of Qwen3Attention, and of classes with its code under other names."""

    normalises = True


class GPT2Forward(FusedForward):
    """Of GPT2Attention, without cross-attention: c_attn's output goes in undivided, and gets one gradient."""

    keywords = FusedForward.keywords | {"encoder_attention_mask", "output_attentions"}

    def fused(self, hidden_states: Tensor, past: Any, **kwargs) -> Tensor:
        module, mask = self.attention, kwargs.pop("attention_mask", None)
        for name in ("cache_position", "encoder_hidden_states", "encoder_attention_mask", "output_attentions"):
            kwargs.pop(name, None)  # the original does not pass them on either
        packed = module.c_attn(hidden_states)
        kwargs["dropout"] = module.attn_dropout.p if module.training else 0.0
        kwargs["scaling"] = getattr(module, "scaling", None)  # since transformers 5.4; the layer knows it before
        return module.resid_dropout(module.c_proj(_attend(module, None, mask, packed, past, **kwargs)))


FORWARDS: dict[str, type[FusedForward]] = {
    "LlamaAttention": LlamaForward,
    "MistralAttention": MistralForward,
    "Qwen2Attention": QwenForward,
    "Qwen3Attention": Qwen3Forward,
    "Qwen3MoeAttention": Qwen3Forward,
    "Dots1Attention": Qwen3Forward,
    "MellumAttention": Qwen3Forward,
    "GPT2Attention": GPT2Forward,
}
"""By the name of the class whose `forward` an attention runs. The name only says which code to expect; `recognition` compares."""


def _forward_of(attention: Any) -> type[FusedForward] | None:
    return FORWARDS.get(recognition.owner_of_forward(type(attention)).__name__)


def _not_wanted(layer: GeoScaleLayer) -> str | None:
    """Why a layer has no use for a fused forward; None where it has one."""
    attention, config = layer.site.attention, layer.config
    if not config.fused_front_end:
        return "fused_front_end=False"
    if config.scaling != "geometry":
        return f"scaling={config.scaling!r} looks at rotated queries and keys"
    if config.span_scaling is not None and not config.span_scaling.is_identity:
        return "span scaling looks at rotated queries and keys"
    return None if _forward_of(attention) else f"{type(attention).__name__} has no fused forward"


def _not_recognised(layer: GeoScaleLayer, forward: type[FusedForward]) -> str | None:
    """Why a fused forward would not do what the layer does; None where it would."""
    attention = layer.site.attention
    own = attention.__dict__.get("forward")
    if own is not None and not isinstance(own, FusedForward):
        return f"{recognition.origin(own)} wrapped or replaced its forward"
    return forward.unknown(attention, layer.site.rotary)


def install(layers: Iterable[GeoScaleLayer]) -> None:
    """Give each layer's attention module its fused forward, where there is one for it; `layer.front_end` says what became of it.

    Logs one warning a reason where there is one, but upstream's code or somebody's wrapper stands against it.
    """
    warn_of_missing()
    declined: dict[str, list[GeoScaleLayer]] = {}
    for layer in layers:
        attention, reason = layer.site.attention, _not_wanted(layer)
        if reason is None:
            forward: Any = _forward_of(attention)
            reason = _not_recognised(layer, forward)
            if reason is None:
                attention.forward = forward(attention)
            else:
                declined.setdefault(reason, []).append(layer)
        layer.front_end = reason or FUSED
    for of_one_reason in declined.values():
        _warn(of_one_reason)


def look_again(attention: Any, layer: GeoScaleLayer) -> str | None:
    """What upstream code of an attention with a fused forward is unknown now, in words; `layer.front_end` follows."""
    forward = attention.__dict__.get("forward")
    if not isinstance(forward, FusedForward):
        return None
    unknown = forward.unknown(attention, layer.site.rotary)
    if layer.front_end != (unknown or FUSED):
        layer.front_end = unknown or FUSED
        if unknown is not None:
            _warn([layer])
    return unknown


def _warn(layers: list[GeoScaleLayer]) -> None:
    first = layers[0]
    said = _warned.setdefault(first.group, set())
    if first.front_end not in said:
        said.add(first.front_end)
        logger.warning(
            "geoscale: %s%s runs through transformers' attention interface, without the fused front end: %s. Certificates speak of "
            "the code that is known: overflows in geometry_report(model) tell if q, k or v left them",
            first.name,
            f" (and {len(layers) - 1} more)" if len(layers) > 1 else "",
            first.front_end,
        )


def remove(attention: Any) -> None:
    """Take the fused forward away. Where somebody has wrapped it since, it stays, and calls the original."""
    if isinstance(attention.__dict__.get("forward"), FusedForward):
        del attention.forward
