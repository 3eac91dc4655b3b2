"""RMS norms of queries and keys over the head dimension in plain PyTorch: the specification of what the kernels do as they load."""

import torch
from torch import Tensor

from .rotary import rotate

QKNorm = tuple[Tensor, Tensor, float]
"""Weights of the norms of q and of k, (D,) each, and what they add to the mean square."""


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
) -> Tensor:
    """weight ∘ x / √(mean(x²) + eps): (..., D) in the type that weight and x promote to.

    Rounds where transformers' Qwen3RMSNorm does: float32 up to the quotient, that to x's dtype, and their product.
    """
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype)


def normalise_and_rotate(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    qk_norm: QKNorm | None,
    rotary: tuple[Tensor, Tensor] | None,  # (B or 1, L, R/2) each
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys after their norm and RoPE, where these are given: shapes and dtypes as they came."""
    dtypes = query.dtype, key.dtype
    if qk_norm is not None:
        *weights, eps = qk_norm
        query, key = (rms_norm(x, weight, eps) for x, weight in zip((query, key), weights, strict=True))
    if rotary is not None:
        query, key = rotate(query, *rotary, interleaved), rotate(key, *rotary, interleaved)
    return query.to(dtypes[0]), key.to(dtypes[1])
