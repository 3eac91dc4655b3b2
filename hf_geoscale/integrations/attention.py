"""The attention function registered with transformers as `geoscale`."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import UnsupportedAttentionError, UnsupportedModelError
from ..kernels import AttentionStatistics, Visibility, fp8_attention
from ..kernels.attention import kernel_operand
from ..kernels.hadamard import hadamard
from ..kernels.qk_norm import QKNorm, normalise_and_rotate
from ..scaling import E4M3, QuantScales
from .front_end import fill_cache, look_again
from .keywords import NOT_HONOURED, keywords_of_losses, parameters, refuse_paged_cache, unknown_keywords
from .layer import GeoScaleLayer
from .masks import CONTINUATION_ROWS, is_key_range, visibility_of_call
from .projections import heads_first
from .softcap import softcap_attention_forward
from .spans import refuse_unknown_sequences, scales_spans, with_scaled_spans

logger = logging.getLogger(__name__)

_OF_SDPA = parameters(sdpa_attention_forward)
"""What SDPA of this transformers release can honour, in calls that are handed over to it."""


def _delegate(
    layer: GeoScaleLayer, reason: str, module: nn.Module, query, key, value, attention_mask, qk_norm, rotary, **call
):
    """Run a call on SDPA, counted under `reason`, and logged once: decoding quietly, anything in training as a warning.

    SDPA has no soft cap: calls with one run in plain PyTorch, counted all the same.
    """
    capped = call["softcap"] is not None
    if not layer.delegated[reason]:
        quiet = reason == "kv_cache" and not query.requires_grad
        level = logging.DEBUG if quiet else logging.WARNING
        backend = "in plain PyTorch" if capped else "on SDPA"
        logger.log(level, "geoscale: %s runs %s (%s); counted in geometry_report", layer.name, backend, reason)
    layer.delegated[reason] += 1
    query, key = normalise_and_rotate(query, key, qk_norm, rotary)
    if attention_mask is not None and is_key_range(attention_mask, key.shape[2]):
        seen = Visibility(query.shape[2], key.shape[2], False, None, attention_mask[:, 0])
        attention_mask = seen.dense(key.device)
    attend = softcap_attention_forward if capped else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **call)


def _decodes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether a call continues a cache by a few rows. `geoscale_mask` gives key ranges, or no mask, to what shall run in FP8."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == keys or (mask is not None and is_key_range(mask, keys)):
        return False
    return rows == 1 if mask is None else rows < CONTINUATION_ROWS


@torch.no_grad()
def _certified(scales: QuantScales, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values fit scales that were made from the weights: those of a cache may come from other weights, a prefix
    that was learnt, or lossy storage. A 2-norm bounds what the Hadamard mix makes of a key."""
    key_norm = torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax((0, 2))
    value_amax = value.abs().amax((0, 2, 3))
    return bool((key_norm * scales.k).amax().maximum((value_amax * scales.v).amax()) <= E4M3.max)


@dataclass
class _Call:
    """One call's operands, for `scaling.CallOperands`."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, Hkv, L, D)
    value: Tensor  # (B, Hkv, L, D)
    incoherent: bool
    softcap: float | None
    attend: partial  # fp8_attention without scales

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def heads(self) -> tuple[int, int]:
        return self.query.shape[1], self.key.shape[1]

    @torch.no_grad()
    def amax(self) -> dict[str, Tensor]:
        q, k, v = (kernel_operand(x, self.attend.keywords["backend"]) for x in (self.query, self.key, self.value))
        operands = {"q": hadamard(q), "k": hadamard(k), "v": v} if self.incoherent else {"q": q, "k": k, "v": v}
        return {name: x.abs().amax(dim=(0, 2, 3)).float() for name, x in operands.items()}

    @torch.no_grad()
    def logit_amax(self, scales: QuantScales) -> Tensor:
        statistics = AttentionStatistics(observe_logits=True)
        self.attend(**_named(scales), dropout_p=0.0, statistics=statistics)
        amax = cast(Tensor, statistics.logit_amax)  # observed, as asked for
        return amax if self.softcap is None else self.softcap * (amax / self.softcap).tanh()


def _named(scales: QuantScales) -> dict[str, Any]:
    """Scales as keyword arguments of `fp8_attention`."""
    return {
        "q_quant_scale": scales.q,
        "k_quant_scale": scales.k,
        "v_quant_scale": scales.v,
        "logit_quant_scale": scales.logit,
    }


def _for_softmax_scale(scales: QuantScales, layer: GeoScaleLayer, softmax_scale: float) -> QuantScales:
    """Scales of logits with the factor of this call, where they were made from the weights and the factor known at patching."""
    measured = None if layer.geometry is None else layer.geometry.softmax_scale
    if layer.config.scaling != "geometry" or not measured or softmax_scale in (0.0, measured):
        return scales
    return replace(scales, logit=cast(Tensor, scales.logit) * abs(measured / softmax_scale))


def _layer_of(module: nn.Module) -> GeoScaleLayer:
    layer = getattr(module, "geoscale", None)
    if not isinstance(layer, GeoScaleLayer):
        raise UnsupportedModelError(
            f'{type(module).__name__} runs with attn_implementation="geoscale" but was never patched: '
            "call hf_geoscale.patch_model(model)"
        )
    return layer


def _unknown_to(layer: GeoScaleLayer, options: dict[str, Any], window: int | None) -> str | None:
    """Why a call's keywords send it to SDPA; None where they do not. A later transformers may pass what changes the result.

    Raises:
        UnsupportedAttentionError: a keyword that neither FP8 attention nor SDPA has, or, unless fallback="sdpa", that is unknown.
    """
    refuse_paged_cache(options, layer.name)
    names = unknown_keywords(options)
    for name in names:
        if name in NOT_HONOURED and name not in _OF_SDPA:
            raise UnsupportedAttentionError(
                f"FP8 attention cannot honour {NOT_HONOURED[name]} ({layer.name} got {name}), and neither can SDPA. Do without, or "
                'unpatch the model and use attn_implementation="eager"'
            )
    names = sorted(set(names) - keywords_of_losses(layer.enclosing)) if names else []
    if window is not None and not _has_window(layer.site.attention, window):
        names.append("sliding_window")
    if not names:
        return None
    if layer.config.fallback != "sdpa":
        raise UnsupportedAttentionError(
            f"FP8 attention does not know the keyword {', '.join(names)} ({layer.name}), which may change the result. Leave it out "
            "of the call, name it in the signature of model.loss_function if it is the loss's, or patch with fallback='sdpa' to "
            "run such calls on SDPA"
        )
    return f"its keyword {', '.join(names)}"


def _has_window(attention: Any, window: int) -> bool:
    """Whether a window is the module's own. A caller's reaches the interface too, and SDPA, whose mask has none, ignores it."""
    return any(getattr(owner, "sliding_window", None) == window for owner in (attention, attention.config))


def _refuse_changed(module: nn.Module, layer: GeoScaleLayer) -> None:
    """Raise UnsupportedAttentionError where a compiled graph holds a fused forward that upstream's code has left behind."""
    unknown = look_again(module, layer)
    if unknown is not None:
        for other in layer.group.layers:  # the next compilation asks each what was seen last
            look_again(other.site.attention, other)
        raise UnsupportedAttentionError(
            f"{unknown} ({layer.name}), since the model was compiled. Call torch.compiler.reset(), so that it is compiled again"
        )


def _refuse_cached_documents(layer: GeoScaleLayer, options: dict[str, Any]) -> None:
    if options.get("cu_seq_lens_q") is not None:
        raise UnsupportedAttentionError(
            f"cu_seq_lens_q says nothing of the keys in a cache ({layer.name}): pass packed documents without past_key_values"
        )


def _refuse_mask(layer: GeoScaleLayer, mask: Tensor) -> str:
    """Why a mask runs on SDPA; raises UnsupportedAttentionError unless that was asked for."""
    reason = f"its mask {tuple(mask.shape)} of {mask.dtype}, which is no range of keys per row"
    if layer.config.fallback != "sdpa":
        raise UnsupportedAttentionError(
            f"FP8 attention cannot honour {reason} ({layer.name}). "
            "Change the mask, or patch with fallback='sdpa' to run such calls on SDPA"
        )
    return reason


def geoscale_attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,  # cos, sin (B or 1, L, R/2)
    qk_norm: QKNorm | None = None,
    packed: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,  # (B, L, (Hq + 2·Hkv)·D), or (B, L, H·D) each
    traced: bool = False,
    past: Any = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """FP8 attention of a patched layer, in the attention interface's form: ((B, Lq, Hq, D), None).

    Decoding runs on SDPA, counted as "kv_cache": fewer than CONTINUATION_ROWS query rows after a past. More rows run in FP8 where
    the cached keys and values fit the certificates, and on SDPA, counted as "uncertified cache", where they do not. A mask that
    cannot be honoured exactly raises UnsupportedAttentionError, or runs on SDPA, counted, with fallback="sdpa". SDPA has no soft
    cap: calls with one run in plain PyTorch instead (`softcap_attention_forward`). `rotary`, `qk_norm`, `packed` and `traced` come
    from the forwards of `front_end`: query and key are yet to be normalised and rotated; query, key and value are views of one
    tensor, or of one each; and a compiler wrote down that forward earlier. A traced call has `packed` in their
    place, and a cache to fill, `past`.

    Raises:
        UnsupportedModelError: the module was never patched.
        UnsupportedAttentionError: a mask or option FP8 attention does not have.
        ValueError: an empty sequence, or cumulative lengths that are not of this batch.
    """
    layer = _layer_of(module)
    if traced:
        _refuse_changed(module, layer)
        if packed is not None:
            query, key, value = heads_first(packed, cast(int, module.head_dim))
        if past is not None:
            fill_cache(module, past, key, value, rotary, qk_norm)
    (batch, _, rows, _), keys = query.shape, key.shape[2]
    scaling = layer.site.softmax_scale if scaling is None else scaling
    # a fused forward takes no keyword that is not known
    unknown = _unknown_to(layer, kwargs, sliding_window) if rotary is None and packed is None else None
    if rows != keys:
        _refuse_cached_documents(layer, kwargs)
    scaled = scales_spans(layer, query, key, value)
    # Spans, and scales that look at activations, are those of rotated operands; a fused forward that somebody wrapped stays.
    if scaled or layer.config.scaling != "geometry":
        query, key = normalise_and_rotate(query, key, qk_norm, rotary)
        rotary = qk_norm = packed = None
    sdpa = {
        "dropout": dropout,
        "scaling": scaling,
        "is_causal": is_causal,
        "softcap": softcap,
        "rotary": rotary,
        "qk_norm": qk_norm,
        **kwargs,
    }
    if unknown is not None:
        if scaled:
            refuse_unknown_sequences(layer, unknown)
        return _delegate(layer, unknown, module, query, key, value, attention_mask, **sdpa)
    if _decodes(query, key, attention_mask):
        if scaled:
            refuse_unknown_sequences(layer, f"{rows} tokens after a cache of {keys - rows}")
        return _delegate(layer, "kv_cache", module, query, key, value, attention_mask, **sdpa)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    packing = {name: kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k")}
    visibility = visibility_of_call(attention_mask, batch, rows, keys, causal, sliding_window, **packing)
    if visibility is None:
        reason = _refuse_mask(layer, cast(Tensor, attention_mask))
        if scaled:
            refuse_unknown_sequences(layer, reason)
        return _delegate(layer, reason, module, query, key, value, attention_mask, **sdpa)
    if scaled:
        query, key, value = with_scaled_spans(layer, visibility, query, key, value)
    seen = key, value
    if visibility.key_length != keys:
        seen = key[:, :, : visibility.key_length], value[:, :, : visibility.key_length]
    attend = partial(
        fp8_attention,
        query,
        *seen,
        packed=packed,
        rotary=rotary,
        qk_norm=qk_norm,
        softmax_scale=scaling,
        softcap=softcap,
        causal=visibility.causal,
        window=visibility.window,
        key_range=visibility.key_range,
        incoherent=layer.config.incoherent,
        precision=layer.config.precision,
        backend=layer.config.backend,
    )
    scales = layer.scales(_Call(query, *seen, layer.config.incoherent, softcap, attend))
    cached = rows != keys and attention_mask is not None
    if cached and layer.config.scaling == "geometry" and not _certified(scales, *seen):
        return _delegate(layer, "uncertified cache", module, query, key, value, attention_mask, **sdpa)
    layer.calls += 1
    layer.front_end_calls += rotary is not None or packed is not None
    used = scales if scales.logit is None else _for_softmax_scale(scales, layer, scaling)
    out: Any = attend(**_named(used), dropout_p=dropout, statistics=layer.statistics)
    layer.observe(scales)
    return out.transpose(1, 2).contiguous(), None
