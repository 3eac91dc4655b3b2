"""Philox 4x32-10, the counter-based generator of attention dropout (Salmon et al., SC 2011, doi 10.1145/2063384.2063405).

Any tile of the mask can be made again from (seed, batch·head, row, column) alone, so nothing is stored for the backward and a
fused kernel draws the same mask. Integer arithmetic in int64, masked to 32 bits.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) − 1, as 32-bit fractions
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (int64 tensors, broadcast shape) for four counter words and a 64-bit seed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) & WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = product1 & WORD, product0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def dropout_keep(
    seed: int,
    dropout_p: float,
    batch_heads: int,
    rows: Tensor,  # (R,) query indices
    columns: Tensor,  # (K,) key indices, from a multiple of 4 on
) -> Tensor:
    """Which attention probabilities survive dropout: (batch_heads, R, K) bool.

    Probability (b·Hq + h, row, column) is kept when word column % 4 of philox((column // 4, row, b·Hq + h, 0), seed) is at
    least dropout_p · 2³².
    """
    device = rows.device
    quads = torch.arange(int(columns[0]) // 4, (int(columns[-1]) + 4) // 4, device=device)
    heads = torch.arange(batch_heads, device=device)
    counter = torch.broadcast_tensors(
        quads[None, None, :],
        rows[None, :, None].long(),
        heads[:, None, None],
        torch.zeros((), dtype=torch.long, device=device),
    )
    words = torch.stack(philox(counter, seed), dim=-1).flatten(-2)
    return words[..., : columns.shape[0]] >= int(dropout_p * 2**32)
