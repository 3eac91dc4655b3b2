"""QK-Clip: after a step, shrink W_Q and W_K of the heads whose largest logit passed a threshold (Kimi K2, arXiv 2507.20534)."""

import torch
from torch import Tensor


def clip_factors(
    logit_amax: Tensor,  # (Hq,) largest |logit| of each head, seen or certified
    threshold: float,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:  # (Hq,), (Hkv,)
    """Factors of W_Q and W_K that bring each head's logits to min(1, threshold/S_max) = γ of what they were, float64.

    √γ on both where a key head has one query head. A key head that several query heads share takes the √ of its group's smallest
    γ, and each query head the rest, γ/√γ_min: so every head's logits shrink by its own γ, and no other head's do. A query head that
    needs no clipping in such a group grows by 1/√γ_min. A head with NaN or Inf counts as one that needs none: its
    weights stay as they are, unless another head of its group is clipped. A step that gave those has diverged, or fp16's
    GradScaler skips it.
    """
    amax = logit_amax.double()
    gamma = torch.where(amax.isfinite(), (threshold / amax).clamp(max=1.0), 1.0)
    grouped = gamma.view(kv_heads, -1)
    key = grouped.amin(dim=-1).sqrt()
    query = torch.where(grouped == grouped.amin(dim=-1, keepdim=True), key[:, None], grouped / key[:, None])
    return query.flatten(), key
