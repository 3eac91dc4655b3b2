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
    width = 2 * cos.shape[-1]
    cos, sin = cos[:, None].float(), sin[:, None].float()
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
