"""The attention function registered with transformers as `geoscale`."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import UnsupportedAttentionError, UnsupportedModelError
from ..kernels import AttentionStatistics, Visibility, fp8_attention
from ..kernels.hadamard import hadamard
from ..scaling import QuantScales
from .layer import GeoScaleLayer
from .masks import key_range_of_mask

logger = logging.getLogger(__name__)

# Keyword arguments of the attention interface that change the result and that neither FP8 attention nor SDPA has.
_NOT_HONOURED = {
    "softcap": "a soft cap on the logits",
    "position_bias": "a position bias on the logits",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "sequence lengths of a packed batch (pass position_ids instead)",
    "output_attentions": "returned attention probabilities",
}


def _delegate(layer: GeoScaleLayer, reason: str, module: nn.Module, *operands, **call):
    """Run a call on SDPA, counted under `reason`, and logged once: decoding quietly, anything in training as a warning."""
    if not layer.delegated[reason]:
        quiet = reason == "kv_cache" and not operands[0].requires_grad
        level = logging.DEBUG if quiet else logging.WARNING
        logger.log(level, "geoscale: %s runs on SDPA (%s); counted in geometry_report", layer.name, reason)
    layer.delegated[reason] += 1
    return sdpa_attention_forward(module, *operands, **call)


def _visibility(mask: Tensor | None, batch: int, length: int, causal: bool, window: int | None) -> Visibility | None:
    """What the mask of a self-attention call means, or None when ranges cannot express it."""
    if mask is None:
        return Visibility(length, length, causal, window if causal else None)
    if mask.dtype == torch.int32 and mask.shape[2:] == (length, 2):  # key ranges of `geoscale_mask`
        key_range: Tensor | None = mask[:, 0]
    elif mask.dim() == 4 and mask.shape[2:] == (length, length):
        key_range = key_range_of_mask(mask)
    else:
        key_range = None
    if key_range is None:
        return None
    return Visibility(length, length, False, None, key_range.expand(batch, -1, -1))


@dataclass(frozen=True)
class _Call:
    """One call's operands, for `scaling.CallOperands`."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, Hkv, L, D)
    value: Tensor  # (B, Hkv, L, D)
    incoherent: bool
    attend: Any  # fp8_attention without scales

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def heads(self) -> tuple[int, int]:
        return self.query.shape[1], self.key.shape[1]

    @torch.no_grad()
    def amax(self) -> dict[str, Tensor]:
        mixed = [hadamard(x) if self.incoherent else x for x in (self.query, self.key)]
        return {name: x.abs().amax(dim=(0, 2, 3)).float() for name, x in zip("qkv", (*mixed, self.value), strict=True)}

    @torch.no_grad()
    def logit_amax(self, scales: QuantScales) -> Tensor:
        statistics = AttentionStatistics(observe_logits=True)
        self.attend(**_named(scales), dropout_p=0.0, statistics=statistics)
        return cast(Tensor, statistics.logit_amax)  # observed, as asked for


def _named(scales: QuantScales) -> dict[str, Any]:
    """Scales as keyword arguments of `fp8_attention`."""
    named = {f"{name}_quant_scale": getattr(scales, name) for name in ("q", "k", "v", "logit")}
    return {name: scale for name, scale in named.items() if scale is not None}


def _shape(mask: Tensor | None) -> str:
    return "None" if mask is None else f"{tuple(mask.shape)} of {mask.dtype}"


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
    **kwargs,
) -> tuple[Tensor, None]:
    """FP8 attention of a patched layer, in the attention interface's form: ((B, Lq, Hq, D), None).

    Calls with a cache (Lq ≠ Lk) run on SDPA, counted as "kv_cache". A mask that cannot be honoured exactly raises
    UnsupportedAttentionError, or runs on SDPA, counted, with fallback="sdpa".

    Raises:
        UnsupportedModelError: the module was never patched.
        UnsupportedAttentionError: a mask or option FP8 attention does not have.
    """
    layer = getattr(module, "geoscale", None)
    if not isinstance(layer, GeoScaleLayer):
        raise UnsupportedModelError(
            f'{type(module).__name__} runs with attn_implementation="geoscale" but was never patched: '
            "call hf_geoscale.patch_model(model) instead of setting the name"
        )
    if scaling is None:
        scaling = layer.site.softmax_scale
    call = {"attention_mask": attention_mask, "dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    refused = [what for name, what in _NOT_HONOURED.items() if name in given]
    if refused:
        raise UnsupportedAttentionError(
            f"FP8 attention cannot honour {refused[0]} ({layer.name}), and neither can SDPA. Do without, or unpatch the model "
            'and use attn_implementation="eager"'
        )
    if query.shape[2] != key.shape[2]:
        return _delegate(layer, "kv_cache", module, query, key, value, **call)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    visibility = _visibility(attention_mask, query.shape[0], query.shape[2], causal, sliding_window)
    if visibility is None:
        reason = f"its mask {_shape(attention_mask)}, which is no range of keys per row"
        if layer.config.fallback != "sdpa":
            raise UnsupportedAttentionError(
                f"FP8 attention cannot honour {reason} ({layer.name}). "
                "Change the mask, or patch with fallback='sdpa' to run such calls on SDPA"
            )
        return _delegate(layer, reason, module, query, key, value, **call)
    layer.calls += 1
    attend = partial(
        fp8_attention,
        query,
        key,
        value,
        softmax_scale=scaling,
        causal=visibility.causal,
        window=visibility.window,
        key_range=visibility.key_range,
        incoherent=layer.config.incoherent,
        precision=layer.config.precision,
        backend=layer.config.backend,
    )
    scales = layer.scales(_Call(query, key, value, layer.config.incoherent, attend))
    out: Any = attend(**_named(scales), dropout_p=dropout, statistics=layer.statistics)
    layer.observe(scales)
    return out.transpose(1, 2).contiguous(), None
