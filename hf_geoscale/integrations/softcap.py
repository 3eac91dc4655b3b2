"""Attention with a soft cap in plain PyTorch: what runs where FP8 attention hands a call over, since SDPA has no cap."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def softcap_attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    attention_mask: Tensor | None,  # (B, 1 or Hq, Lq, Lk), bool (True = visible) or additive
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax(softcap·tanh(S/softcap) + mask)·V, logits in float32, in the attention interface's form: ((B, Lq, Hq, D), None).

    A missing mask means what it means to transformers' `sdpa_attention_forward`: causal when there are several queries, which
    then see the first Lq keys (an empty static cache holds more). Memory is quadratic in the length. Logits as in transformers'
    `modeling_gemma2.eager_attention_forward`; key heads are never repeated.
    """
    length, kv_heads = query.shape[2], key.shape[1]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    grouped = query.unflatten(1, (kv_heads, -1))  # (B, Hkv, G, Lq, D)
    logits = (grouped @ key[:, :, None].mT).float() * scaling
    logits = softcap * (logits / softcap).tanh()
    if attention_mask is not None:
        by_head = attention_mask.shape[1] > 1
        mask = attention_mask.unflatten(1, (kv_heads, -1)) if by_head else attention_mask[:, :, None]
        if mask.dtype == torch.bool:  # hidden is finite, so that a row that sees nothing gives no NaN
            mask = torch.where(mask, 0.0, torch.finfo(logits.dtype).min)
        logits = logits + mask
    weights = F.dropout(logits.softmax(-1).to(value.dtype), dropout)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None
