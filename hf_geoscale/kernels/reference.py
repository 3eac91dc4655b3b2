"""FP8 attention, forward and backward, in plain PyTorch: the specification of the fused kernels, and the CPU default.

FP8 values are real FP8 tensors; they are multiplied as float32, which is exact, so only the order of accumulation is open.
Work goes by blocks of `visibility.ROW_BLOCK` query rows: memory is linear in the sequence length. A group's query heads are folded
into the rows of its key/value head (G·R rows), so keys are never repeated. Rounding points, in order:

forward   q, k ← Hadamard (float32) · quant_scale → E4M3;  v · quant_scale → E4M3
          S = q8·k8ᵀ (float32) → P̃ = exp2(S_log2 − row maximum) → E4M3 as 256·P̃ → O = P̃8·v8 / Σ P̃ → output dtype
backward  dO′ = dO / Σ P̃ → E4M3, scaled by the block's amax;  δ = rowsum(dO′8 · O);  S and P̃ again, from the same q8, k8
          dS = P̃·(dO′8·v8ᵀ − δ) → E4M3, scaled by the bound 2·max‖dO′8 row‖·N_V
          dV = P̃8ᵀ·dO′8, dQ = dS8·k8, dK = dS8ᵀ·q8 (float32) → Hadamard
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scaling.formats import E4M3, count_overflow, saturating_cast
from .hadamard import hadamard
from .philox import dropout_keep
from .statistics import AttentionStatistics
from .visibility import Visibility

PROBABILITY_QUANT_SCALE = 256.0
"""P̃ ≤ 1 is stored as 256·P̃: the largest power of two below 448, so probabilities down to 2⁻¹⁷ survive E4M3."""

RESIDUAL_GAIN = 16.0
"""The second FP8 term of k holds 16 × the first one's rounding error: at most half a unit in the last place, 16·16 = 256."""

GRADIENT_MARGIN = 1 + E4M3.epsilon
"""Widens the dS certificate for the rounding of v8 and P̃8 (half an E4M3 epsilon each), which its derivation takes as exact."""


@dataclass(frozen=True)
class Operands:
    """What the forward leaves for the backward: FP8 operands and their descales (1/quant_scale)."""

    q8: Tensor  # (B, Hq, Lq, D) E4M3
    k8: Tensor  # (B, Hkv, Lk, D) E4M3
    v8: Tensor  # (B, Hkv, Lk, D) E4M3
    k8_residual: Tensor | None  # (B, Hkv, Lk, D) E4M3 with precision="high"
    q_descale: Tensor  # (Hq,)
    k_descale: Tensor  # (Hkv,)
    v_descale: Tensor  # (Hkv,)

    @property
    def groups(self) -> tuple[int, int]:
        """(Hkv, query heads per key/value head)."""
        return self.k8.shape[1], self.q8.shape[1] // self.k8.shape[1]

    def keys(self) -> Tensor:
        """k8, plus its second term with precision="high", as float32 in FP8 units: (B, Hkv, Lk, D). Exact."""
        keys = self.k8.float()
        return keys if self.k8_residual is None else keys + self.k8_residual.float() / RESIDUAL_GAIN


@dataclass(frozen=True)
class Options:
    """What a call computes, apart from its tensors."""

    softmax_scale: float
    incoherent: bool = True
    dropout_p: float = 0.0
    dropout_seed: int = 0


def quantize_operand(
    x: Tensor,  # (B, H, L, D)
    quant_scale: Tensor,  # (H,)
    mix: bool,
    name: str,
    statistics: AttentionStatistics,
) -> Tensor:
    """x·quant_scale in float32, after the Hadamard mix when `mix`; overflow and range are recorded: (B, H, L, D)."""
    scaled = (hadamard(x) if mix else x.float()) * quant_scale[:, None, None]
    statistics.add_overflow(count_overflow(scaled))
    statistics.add_range(name, scaled.abs().amax(dim=(0, 2, 3)) / E4M3.max)
    return scaled


def quantize(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    q_quant_scale: Tensor,  # (Hq,)
    k_quant_scale: Tensor,  # (Hkv,)
    v_quant_scale: Tensor,  # (Hkv,)
    options: Options,
    precision: str,
    statistics: AttentionStatistics,
) -> Operands:
    """E4M3 operands of one call. precision="high" gives k a second term holding the first one's rounding error."""
    q = quantize_operand(query, q_quant_scale, options.incoherent, "q", statistics)
    k = quantize_operand(key, k_quant_scale, options.incoherent, "k", statistics)
    v = quantize_operand(value, v_quant_scale, False, "v", statistics)
    k8 = saturating_cast(k)
    residual = saturating_cast((k - k8.float()) * RESIDUAL_GAIN) if precision == "high" else None
    return Operands(
        saturating_cast(q), k8, saturating_cast(v), residual, 1 / q_quant_scale, 1 / k_quant_scale, 1 / v_quant_scale
    )


def _fold(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """(B, Hq, R, D) → (B, Hkv, G·R, D)."""
    return x.unflatten(1, groups).flatten(2, 3)


def _unfold(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """(B, Hkv, G·R, D) → (B, Hq, R, D)."""
    return x.unflatten(2, (groups[1], -1)).flatten(1, 2)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(H,) of key/value or query heads → (Hq, 1, 1)."""
    return x.repeat_interleave(heads // x.shape[0])[:, None, None]


def _logits_log2(q8: Tensor, keys: Tensor, operands: Operands, options: Options) -> Tensor:
    """S·log2(e) of one tile: (B, Hq, R, K). Forward and backward must get the same bits from here."""
    groups = operands.groups
    raw = _unfold(_fold(q8.float(), groups) @ keys.mT, groups)
    descale = _per_head(operands.q_descale, q8.shape[1]) * _per_head(operands.k_descale, q8.shape[1])
    return raw * (descale * (options.softmax_scale * math.log2(math.e)))


def _probabilities(logits_log2: Tensor, visible: Tensor, row_max: Tensor) -> Tensor:
    """P̃ = exp2(S_log2 − row maximum) in [0, 1], 0 where hidden: (B, Hq, R, K)."""
    return (logits_log2 - row_max[..., None]).masked_fill(~visible[:, None], -math.inf).exp2().clamp_(max=1)


def _keep(options: Options, batch: int, heads: int, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
    """Dropout mask of one tile, (B, Hq, R, K) bool, or None without dropout."""
    if options.dropout_p == 0:
        return None
    row_indices = torch.arange(rows.start, rows.stop, device=device)
    key_indices = torch.arange(keys.start, keys.stop, device=device)
    keep = dropout_keep(options.dropout_seed, options.dropout_p, batch * heads, row_indices, key_indices)
    return keep.unflatten(0, (batch, heads))


def forward(
    operands: Operands,
    visibility: Visibility,
    options: Options,
    out_dtype: torch.dtype,
    statistics: AttentionStatistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output O (B, Hq, Lq, D) in `out_dtype`, row maxima of S_log2 and row sums of P̃ (both (B, Hq, Lq) float32).

    A row that sees no key gives O = 0, with row maximum 0 and row sum 0.
    """
    q8, groups, device = operands.q8, operands.groups, operands.q8.device
    batch, heads, length, dim = q8.shape
    keys, values = operands.keys(), operands.v8.float()
    out = torch.empty(batch, heads, length, dim, dtype=out_dtype, device=device)
    row_max = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    row_sum = torch.empty_like(row_max)
    descale = _per_head(operands.v_descale, heads) / (PROBABILITY_QUANT_SCALE * (1 - options.dropout_p))
    for rows, columns, visible in visibility.blocks(device):
        logits = _logits_log2(q8[:, :, rows], keys[:, :, columns], operands, options)
        hidden = ~visible[:, None]
        maximum = logits.masked_fill(hidden, -math.inf).amax(-1)
        maximum = maximum.masked_fill(~visible.any(-1)[:, None], 0.0)
        if statistics.observe_logits:
            statistics.add_logits(logits.masked_fill(hidden, 0).abs().amax(dim=(0, 2, 3)) * math.log(2))
        p = _probabilities(logits, visible, maximum)
        total = p.sum(-1)
        p8 = saturating_cast(p * PROBABILITY_QUANT_SCALE).float()
        keep = _keep(options, batch, heads, rows, columns, device)
        if keep is not None:
            p8 = p8 * keep
        weighted = _unfold(_fold(p8, groups) @ values[:, :, columns], groups)
        safe_total = torch.where(total > 0, total, 1.0)
        out[:, :, rows] = (weighted * descale / safe_total[..., None]).to(out_dtype)
        row_max[:, :, rows], row_sum[:, :, rows] = maximum, total
    return out, row_max, row_sum


def quantize_output_gradient(
    grad_rows: Tensor,  # (B, Hq, R, D) dO of one block of rows
    row_sum: Tensor,  # (B, Hq, R)
) -> tuple[Tensor, Tensor]:
    """dO′ = dO / Σ P̃ in E4M3 and its descale (B, Hq, 1, 1), from the block's amax: the one measured scale.

    It is a gradient, so nothing leaks into the forward. Rows that saw no key get 0.
    """
    folded = grad_rows.float() * torch.where(row_sum > 0, 1 / row_sum, 0.0)[..., None]
    amax = folded.abs().amax(dim=(2, 3), keepdim=True)
    quant_scale = torch.where(amax > 0, E4M3.max / amax, 1.0)
    return saturating_cast(folded * quant_scale), 1 / quant_scale


def backward(
    grad_out: Tensor,  # (B, Hq, Lq, D)
    out: Tensor,  # (B, Hq, Lq, D) as the forward returned it
    row_max: Tensor,  # (B, Hq, Lq)
    row_sum: Tensor,  # (B, Hq, Lq)
    operands: Operands,
    visibility: Visibility,
    options: Options,
    statistics: AttentionStatistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ (B, Hq, Lq, D), dK, dV (B, Hkv, Lk, D), float32, with respect to the unquantised, unmixed operands."""
    groups, device = operands.groups, operands.q8.device
    batch, heads, _, _ = operands.q8.shape
    keys, values = operands.keys(), operands.v8.float()
    dq = torch.empty(operands.q8.shape, dtype=torch.float32, device=device)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    q_descale, k_descale, v_descale = (
        _per_head(x, heads) for x in (operands.q_descale, operands.k_descale, operands.v_descale)
    )
    survival = 1 - options.dropout_p
    v_norm_bound = v_descale * E4M3.max  # N_V bounds the norm of v, not only its entries
    for rows, columns, visible in visibility.blocks(device):
        q_rows = operands.q8[:, :, rows].float()
        logits = _logits_log2(q_rows, keys[:, :, columns], operands, options)
        p = _probabilities(logits, visible, row_max[:, :, rows])
        p8 = saturating_cast(p * PROBABILITY_QUANT_SCALE).float()
        do8, do_descale = quantize_output_gradient(grad_out[:, :, rows], row_sum[:, :, rows])
        do8 = do8.float()
        do = do8 * do_descale
        delta = (do * out[:, :, rows].float()).sum(-1, keepdim=True)
        dp = _unfold(_fold(do8, groups) @ values[:, :, columns].mT, groups) * (do_descale * v_descale / survival)
        keep = _keep(options, batch, heads, rows, columns, device)
        if keep is not None:
            dp, p8 = dp * keep, p8 * keep
        ds_bound = do.norm(dim=-1).amax(-1)[..., None, None] * v_norm_bound * (2 * GRADIENT_MARGIN / survival)
        ds_quant_scale = torch.where(ds_bound > 0, E4M3.max / ds_bound, 1.0)
        ds = p * (dp - delta) * ds_quant_scale
        statistics.add_overflow(count_overflow(ds))
        ds8 = saturating_cast(ds).float() * (options.softmax_scale / ds_quant_scale)
        dq[:, :, rows] = _unfold(_fold(ds8, groups) @ keys[:, :, columns], groups) * k_descale
        dk[:, :, columns] += _fold(ds8, groups).mT @ _fold(q_rows * q_descale, groups)
        dv[:, :, columns] += _fold(p8, groups).mT @ _fold(do / (PROBABILITY_QUANT_SCALE * survival), groups)
    if options.incoherent:
        dq, dk = hadamard(dq), hadamard(dk)
    return dq, dk, dv


__all__ = ["Operands", "Options", "backward", "forward", "quantize", "quantize_output_gradient"]
