"""Rotary position embeddings (RoPE) in plain PyTorch: the specification of what the kernels do while they load q and k."""

import torch
from torch import Tensor


def rotate(
    x: Tensor,  # (B, H, L, D)
    cos: Tensor,  # (B or 1, L, R/2)
    sin: Tensor,  # (B or 1, L, R/2)
    interleaved: bool = False,
) -> Tensor:
    """Turn pairs of the first R channels by their position's angles, in float32, and round once: (B, H, L, D) in x's dtype.

    Pairs are (d, d + R/2) as in Llama, or (2d, 2d + 1) with `interleaved` as in GPT-J. A factor on cos and sin (YaRN) scales both.
    """
    half, pair = cos.shape[-1], -1 if interleaved else -2
    cos, sin = cos[:, None].float(), sin[:, None].float()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = turned.float().unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(pair)
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=pair)
    return torch.cat([pairs.flatten(-2).to(x.dtype), rest], dim=-1)
