"""How much one attention layer and its norms amplify rounding errors, to first order.

Quantities of arXiv 2510.21770 (v1) and of its AISTATS 2026 version. The papers' bodies were not available to us: the formulas
come from summaries, and what those leave open is decided here and said so (docs/fragility_method.md). S are the logits as they
enter the softmax (scaled, capped where there is a soft cap), P = softmax(S). Everything is float32 or float64, without gradient.
Frobenius norms are root-sum-squares over batch, query heads and rows; a key or value head counts once for each query head that
reads it, so that grouped heads and their repeated copies give the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..geometry import gram, interaction_sigma_upper, sigma_upper
from ..geometry.spectral import COLD_ROUNDS

Norms = Literal["exact", "sampled"]

SAMPLED_ROWS = 16
"""Rows a head whose softmax Jacobian is looked at (published)."""

POWER_ROUNDS = 2
"""Power iterations on a softmax Jacobian (published)."""

CHUNK_ENTRIES = 2**24
"""Logits in a block of rows, 64 MiB in float32, of which a handful are held at a time: no L × L matrix is ever stored."""

VALUE_FLOOR = 3e-6
"""Added to σ_min(V) in κ(V) (published)."""


@dataclass(frozen=True)
class AttentionCall:
    """The operands of one attention call and what each row sees.

    Args:
        query: (B, Hq, L, D) and key, value: (B, Hkv, L, D), as the attention gets them: after RoPE and q/k norms.
        softmax_scale: factor on q·k, dimensionless.
        visible: row indices (R,) → bool (B or 1, 1 or Hq, R, L), True where a row sees a key. None: causal.
        bias: row indices → additive mask of the same shapes, for masks that are more than visible or not.
        tokens: (B, L) bool, False for padding, which enters no norm. None: all are tokens.
        softcap: c of c·tanh(S/c).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    visible: Callable[[Tensor], Tensor] | None = None
    bias: Callable[[Tensor], Tensor] | None = None
    tokens: Tensor | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def seen(self, rows: Tensor) -> Tensor:
        """(B or 1, 1 or Hq, R, L) bool."""
        if self.visible is not None:
            return self.visible(rows)
        keys = torch.arange(self.key.shape[2], device=rows.device)
        return (keys <= rows[:, None])[None, None]

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """S and P of some rows: (B, Hq, R, L) float32; S is 0 where a key is hidden, and both are where a row sees none."""
        query = self.query[:, :, rows].float().unflatten(1, (self.key.shape[1], self.group))
        logits = (query @ self.key.float()[:, :, None].mT).flatten(1, 2) * self.softmax_scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        if self.bias is not None:
            logits = logits + self.bias(rows)
        hidden = ~self.seen(rows)
        probabilities = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        return logits.masked_fill(hidden, 0.0), probabilities

    def row_weights(self, rows: Tensor) -> Tensor:
        """1 for rows of tokens, 0 for padding: (B or 1, 1, R) float32."""
        if self.tokens is None:
            return torch.ones(1, 1, len(rows), device=rows.device)
        return self.tokens[:, None, rows].float()

    def of_tokens(self, operand: Tensor) -> Tensor:
        """An operand (B, H, L, D) in float32, with 0 at padding."""
        operand = operand.float()
        return operand if self.tokens is None else operand * self.tokens[:, None, :, None]


def sampled_rows(length: int, count: int = SAMPLED_ROWS) -> list[int]:
    """The middles of `count` equal parts of the rows, the same in every layer, step and process."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def row_strata(length: int, count: int = SAMPLED_ROWS) -> tuple[list[int], list[float]]:
    """Rows and how many each stands for, in parts that grow geometrically: ‖p_row‖² of a causal softmax falls like 1/row, so
    that equal parts would give the first rows far too much weight."""
    edges = sorted({0, length, *(round(length ** (i / count)) for i in range(count + 1))})
    pairs = list(pairwise(edges))
    return [(a + b) // 2 for a, b in pairs], [float(b - a) for a, b in pairs]


def jacobian_norm(
    probabilities: Tensor,  # (..., L), rows that sum to 1
    rounds: int = POWER_ROUNDS,
) -> Tensor:
    """‖J v‖, J = diag(p) − p pᵀ, after `rounds` power iterations v ← J v/‖J v‖ from a fixed random v: (...).

    A lower bound of λ_max(J) = ‖J‖₂ ≤ 1/2, which it approaches with the rounds.
    """
    length = probabilities.shape[-1]
    start = torch.randn(length, generator=torch.Generator().manual_seed(0), device="cpu")
    vector = start.to(probabilities.device, probabilities.dtype).expand_as(probabilities)
    norm = probabilities.new_zeros(())
    for _ in range(rounds):
        vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-30)
        vector = probabilities * vector - (probabilities * vector).sum(-1, keepdim=True) * probabilities
        norm = torch.linalg.vector_norm(vector, dim=-1)
    return norm


def _blocks(call: AttentionCall, norms: Norms) -> Iterator[tuple[Tensor, Tensor]]:
    """Row indices and how many rows each stands for."""
    batch, heads, length, _ = call.query.shape
    device = call.query.device
    if norms == "sampled":
        rows, weights = row_strata(length)
        yield torch.tensor(rows, device=device), torch.tensor(weights, device=device)
        return
    size = max(1, CHUNK_ENTRIES // (batch * heads * length))
    for rows in torch.arange(length, device=device).split(size):
        yield rows, torch.ones(len(rows), device=device)


def softmax_norms(call: AttentionCall, norms: Norms = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """‖S‖_F over visible pairs, ‖P‖_F, and the rows' mean entropy in nats: 0-dimensional.

    "exact" reads every row, in blocks: as much arithmetic as the attention itself. "sampled" estimates the sums from
    SAMPLED_ROWS rows of `row_strata`: some tens of per cent off, at a cost that no longer grows with L².
    """
    totals = torch.zeros(4, device=call.query.device)
    heads = call.query.shape[1]
    for rows, times in _blocks(call, norms):
        logits, probabilities = call.logits(rows)
        weights = call.row_weights(rows) * times  # (B or 1, 1, R)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        parts = (logits.square().sum(-1), probabilities.square().sum(-1), entropy)
        count = weights.expand(call.query.shape[0], -1, -1).sum() * heads
        totals += torch.stack([*((part * weights).sum() for part in parts), count])
    scores, mass, entropy, count = totals
    return scores.sqrt(), mass.sqrt(), entropy / count.clamp_min(1)


def _row_extremes(call: AttentionCall, v1: bool) -> tuple[Tensor, Tensor]:
    """D_smx and v1's κ_softmax, the maxima over sampled rows, heads and batch."""
    rows = torch.tensor(sampled_rows(call.query.shape[2]), device=call.query.device)
    logits, probabilities = call.logits(rows)
    mask = call.row_weights(rows) > 0
    d_smx = jacobian_norm(probabilities).masked_fill(~mask, 0.0).amax()
    if not v1:
        return d_smx, d_smx
    ratio = torch.linalg.vector_norm(logits, dim=-1) / torch.linalg.vector_norm(probabilities, dim=-1)
    kappa = jacobian_norm(probabilities, COLD_ROUNDS) * ratio.nan_to_num(0.0)
    return d_smx, kappa.masked_fill(~mask, 0.0).amax()


def _value_condition(gram_v: Tensor) -> Tensor:
    """κ(V) = σ_max/(σ_min + floor) per head from VᵀV (N, D, D), on the CPU; unbounded for values of deficient rank."""
    gram_v = gram_v.cpu()
    if not bool(torch.isfinite(gram_v).all()):
        return gram_v.new_tensor(torch.nan)
    squared = torch.linalg.eigvalsh(gram_v).clamp_min(0)
    return (squared[:, -1].sqrt() / (squared[:, 0].sqrt() + VALUE_FLOOR)).amax()


@torch.no_grad()
def attention_fragility(call: AttentionCall, norms: Norms = "exact", v1: bool = True) -> dict[str, Tensor]:
    """Fragility of one attention call; each value 0-dimensional, on the operands' device or the CPU.

    Returns:
        `d_smx` = max over sampled rows of ‖J v‖; `kappa_softmax` = (‖S‖_F/‖P‖_F)·D_smx;
        `chi_score` = softmax_scale·‖Q‖_F‖K‖_F/‖P‖_F·D_smx; `attention_magnitude` = (κ_softmax + χ_score)·‖P‖_F·max_h‖V_h‖₂;
        `value_sigma` = max_h‖V_h‖₂ (at most D^(1/256) high); `score_norm`, `probability_norm`, `entropy` (nats).
        With `v1` also `kappa_score` = max_h softmax_scale·‖Q_h‖₂‖K_h‖₂/‖S_h‖₂ (S without mask or cap, so that D×D Gram matrices
        give it), `kappa_softmax_v1` and `kappa_value`.
    Raises:
        ValueError: an empty sequence, or an unknown `norms`.
    """
    if norms not in ("exact", "sampled"):
        raise ValueError(f"norms must be 'exact' or 'sampled', got {norms!r}")
    if call.query.shape[2] == 0 or call.query.shape[2] != call.key.shape[2]:
        raise ValueError(
            f"fragility needs whole sequences, as many keys as queries: got {call.query.shape[2]} and {call.key.shape[2]}; "
            "pass use_cache=False and at least one token"
        )
    with torch.autocast(call.query.device.type, enabled=False):
        score_norm, probability_norm, entropy = softmax_norms(call, norms)
        d_smx, kappa_softmax_v1 = _row_extremes(call, v1)
        query, key, value = (call.of_tokens(x) for x in (call.query, call.key, call.value))
        per_row = d_smx / probability_norm.clamp_min(1e-30)
        kappa = score_norm * per_row
        chi = call.softmax_scale * query.norm() * key.norm() * call.group**0.5 * per_row
        gram_v = gram(value.flatten(0, 1).mT)
        value_sigma = sigma_upper(gram_v).amax()
        found = {
            "d_smx": d_smx,
            "kappa_softmax": kappa,
            "chi_score": chi,
            "attention_magnitude": (kappa + chi) * probability_norm * value_sigma,
            "value_sigma": value_sigma,
            "score_norm": score_norm,
            "probability_norm": probability_norm,
            "entropy": entropy,
        }
        if v1:
            gram_q, gram_k = gram(query.flatten(0, 1).mT), gram(key.flatten(0, 1).mT)
            product = (sigma_upper(gram_q).view(len(gram_k), -1) * sigma_upper(gram_k)[:, None]).flatten()
            found["kappa_score"] = (product / interaction_sigma_upper(gram_q, gram_k)).amax()
            found["kappa_softmax_v1"] = kappa_softmax_v1
            found["kappa_value"] = _value_condition(gram_v)
    return found


@torch.no_grad()
def norm_magnitude(
    x: Tensor,  # (N, d) inputs of the norm layer, tokens only
    gain: Tensor | None,  # (d,)
    epsilon: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """max|γ|·√Σ_t ((ε + 2 s_t)/(s_t + ε)^1.5·‖x_t‖)², and the median of s_t over tokens: 0-dimensional.

    s_t is a token's variance for LayerNorm (`centred`) and its mean square for RMSNorm, whose Jacobian has the same bound:
    γ/√(s+ε)·(I − x xᵀ/(d(s+ε))) is at most γ·(1 + s/(s+ε))/√(s+ε). Taking s_t a token at a time is our reading.
    """
    x = x.float()
    spread = x.var(-1, correction=0) if centred else x.square().mean(-1)
    factor = (epsilon + 2 * spread) / (spread + epsilon) ** 1.5
    largest = x.new_ones(()) if gain is None else gain.detach().abs().amax().to(x.device, torch.float32)
    return largest * (factor * torch.linalg.vector_norm(x, dim=-1)).norm(), spread.median()
