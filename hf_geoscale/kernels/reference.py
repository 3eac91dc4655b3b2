"""FP8 attention, forward and backward, in plain PyTorch: the specification of the fused kernels, and the CPU default.

FP8 values are real FP8 tensors, multiplied as float32, which is exact. Every sum is a float32 sum: over channels (S,
dP), over keys (O, dQ) and over rows (dK, dV). Only the order of a sum is open. Hopper's FP8 matrix unit keeps 13 bits:
docs/sums.md says how many products a kernel may add there.
Work goes by blocks of `visibility.ROW_BLOCK` query rows: memory is linear in the sequence length. A group's query heads are folded
into the rows of its key/value head (G·R rows), so keys are never repeated. Rounding points, in order:

forward   q, k ← Hadamard (float32) · quant_scale → E4M3;  v · quant_scale → E4M3
          S = q8·k8ᵀ (float32) [→ cap·tanh(S/cap), with a softcap] [→ E4M3, with a logit_quant_scale]
          P̃ = exp2(S_log2 − row maximum) → E4M3 as 256·P̃
          O = P̃8·v8 / Σ P̃ → output dtype
backward  dO′ = dO / Σ P̃ → E4M3, scaled by its amax over GRADIENT_ROWS rows;  δ = rowsum(dO′8 · O);  S and P̃ again, from the
          same q8, k8;  dS = P̃·(dO′8·v8ᵀ − δ) → E4M3 twice: for dQ scaled by the bound of its row, for dK by that of its group
          dV = P̃8ᵀ·dO′8, dQ = dS8·k8, dK = dS8ᵀ·q8 (float32) → Hadamard
A soft cap multiplies dS by its derivative, 1 − tanh²(S/cap) ∈ [0, 1], before dS is rounded: the bound of dS holds as it is.
Quantised logits (arXiv 2602.18851) pass their gradient straight through: dS is the gradient of the logit before its rounding.
The bound of dS is Cauchy–Schwarz on what the matrix unit multiplies: 2·‖dO′8 row‖·max‖v8 row‖. Like the amax of dO′ it is
measured in the backward, where nothing can leak into a forward.
"""

import math

import torch
from torch import Tensor

from ..scaling.formats import E4M3, count_overflow, saturating_cast
from .hadamard import hadamard
from .operands import Operands, Options, quantize
from .philox import dropout_keep
from .statistics import AttentionStatistics
from .visibility import Visibility

PROBABILITY_QUANT_SCALE = 256.0
"""P̃ ≤ 1 is stored as 256·P̃: the largest power of two below 448, so probabilities down to 2⁻¹⁷ survive E4M3."""

GRADIENT_ROWS = 2048
"""Query rows that share the scale of dO′8, and of dS8 in dK: dK and dV sum over rows, so their scales may not differ row by row."""

GRADIENT_AMAX_MIN = 2.0**-66
"""Least amax of dO′ that still sets its scale: keeps the ratio of two groups' scales far from float32's limits."""

LOGIT_GRADIENT_MARGIN = 1 + E4M3.epsilon
"""Widens the bound of dS for the rounding of v8 and P̃8 (half an E4M3 epsilon each), which its derivation takes as exact."""

LOGIT_GRADIENT_BOUND_MIN = 2.0**-20
"""Below the product of the two least non-zero E4M3 norms (2⁻⁹ each): only an all-zero dO′ or v has a smaller bound."""

ROUNDED_NORM_MARGIN = 1 + E4M3.epsilon / 2
"""‖dO′8‖ ≤ this · ‖dO′·quant_scale‖ + √D/1024: half an E4M3 epsilon per normal value, half a subnormal step (2⁻¹⁰) below."""


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


def _cap(logits_log2: Tensor, options: Options) -> Tensor:
    """S·log2(e) after the soft cap, cap·tanh(S/cap), if there is one: (B, Hq, R, K)."""
    if options.softcap is None:
        return logits_log2
    cap = options.softcap * math.log2(math.e)
    return (logits_log2 / cap).tanh() * cap


def _cap_slope(capped_log2: Tensor, options: Options) -> Tensor | float:
    """Derivative of the soft cap where it gave these logits, 1 − (S'/cap)²: (B, Hq, R, K), or 1 without a cap."""
    if options.softcap is None:
        return 1.0
    return 1 - (capped_log2 / (options.softcap * math.log2(math.e))).square()


def _logit_unit(operands: Operands) -> Tensor | None:
    """What one unit of S_log2 is as a scaled logit, before its rounding to E4M3: (Hq, 1, 1), or None for unquantised logits."""
    if operands.logit_quant_scale is None:
        return None
    return operands.logit_quant_scale[:, None, None] * math.log(2)


def _round_logits(logits_log2: Tensor, unit: Tensor | None) -> Tensor:
    """Logits as E4M3 keeps them, where they are quantised: (B, Hq, R, K)."""
    return logits_log2 if unit is None else saturating_cast(logits_log2 * unit).float() / unit


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
    unit, logit_range = _logit_unit(operands), torch.zeros(heads, dtype=torch.float32, device=device)
    for rows, columns, visible in visibility.blocks(device):
        logits = _logits_log2(q8[:, :, rows], keys[:, :, columns], operands, options)
        hidden = ~visible[:, None]
        uncapped, logits = logits, _cap(logits, options)
        if unit is not None:
            scaled = (logits * unit).masked_fill(hidden, 0)
            statistics.add_overflow("logit", count_overflow(scaled))
            logit_range = torch.maximum(logit_range, scaled.abs().amax(dim=(0, 2, 3)) / E4M3.max)
        if statistics.observe_logits:
            statistics.add_logits(uncapped.masked_fill(hidden, 0).abs().amax(dim=(0, 2, 3)) * math.log(2))
        logits = _round_logits(logits, unit)
        maximum = logits.masked_fill(hidden, -math.inf).amax(-1)
        maximum = maximum.masked_fill(~visible.any(-1)[:, None], 0.0)
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
    if unit is not None:
        statistics.add_range("logit", logit_range)
    return out, row_max, row_sum


def fold_row_sum(
    grad_rows: Tensor,  # (B, Hq, R, D) dO of some rows
    row_sum: Tensor,  # (B, Hq, R)
) -> Tensor:
    """dO′ = dO / Σ P̃, float32; 0 for rows that saw no key: (B, Hq, R, D)."""
    return grad_rows.float() * torch.where(row_sum > 0, 1 / row_sum, 0.0)[..., None]


def gradient_scales(
    grad_out: Tensor,  # (B, Hq, Lq, D)
    row_sum: Tensor,  # (B, Hq, Lq)
) -> tuple[Tensor, Tensor]:
    """quant_scale of dO′ and a bound on the row norms of dO′8, per group of GRADIENT_ROWS rows: both (B, Hq, groups)."""
    amax, norm = [], []
    for start in range(0, grad_out.shape[2], GRADIENT_ROWS):
        rows = slice(start, start + GRADIENT_ROWS)
        folded = fold_row_sum(grad_out[:, :, rows], row_sum[:, :, rows])
        amax.append(folded.abs().amax(dim=(2, 3)))
        norm.append(folded.norm(dim=-1).amax(-1))
    quant_scale = E4M3.max / torch.stack(amax, -1).clamp_min(GRADIENT_AMAX_MIN)
    rounding = grad_out.shape[-1] ** 0.5 / 1024
    return quant_scale, torch.stack(norm, -1) * quant_scale * ROUNDED_NORM_MARGIN + rounding


def logit_gradient_quant_scale(norm: Tensor, v_norm: Tensor, survival: float) -> Tensor:
    """quant_scale of dS in units of dO′8·v8, from the bound 2 · ‖dO′8 row‖ · max‖v8 row‖; shapes broadcast."""
    bound = norm * v_norm * (2 * LOGIT_GRADIENT_MARGIN / survival)
    return E4M3.max / bound.clamp_min(LOGIT_GRADIENT_BOUND_MIN)


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
    survival, logit_unit = 1 - options.dropout_p, _logit_unit(operands)
    v_norm = values.norm(dim=-1).amax(-1).repeat_interleave(groups[1], dim=1)[..., None]  # (B, Hq, 1)
    do_quant_scales, group_norms = gradient_scales(grad_out, row_sum)
    group_scales = logit_gradient_quant_scale(group_norms, v_norm, survival)
    for rows, columns, visible in visibility.blocks(device):
        group = rows.start // GRADIENT_ROWS
        q_rows = operands.q8[:, :, rows].float()
        logits = _cap(_logits_log2(q_rows, keys[:, :, columns], operands, options), options)
        p = _probabilities(_round_logits(logits, logit_unit), visible, row_max[:, :, rows])
        p8 = saturating_cast(p * PROBABILITY_QUANT_SCALE).float()
        do_quant_scale = do_quant_scales[:, :, group, None, None]
        do8 = saturating_cast(fold_row_sum(grad_out[:, :, rows], row_sum[:, :, rows]) * do_quant_scale).float()
        delta = (do8 * out[:, :, rows].float()).sum(-1, keepdim=True) / v_descale
        dp = _unfold(_fold(do8, groups) @ values[:, :, columns].mT, groups) / survival
        keep = _keep(options, batch, heads, rows, columns, device)
        if keep is not None:
            dp, p8 = dp * keep, p8 * keep
        ds = p * (dp - delta) * _cap_slope(logits, options)  # in units of dO′8·v8
        row_scale = logit_gradient_quant_scale(do8.norm(dim=-1), v_norm, survival)[..., None]
        group_scale = group_scales[:, :, group, None, None]
        statistics.add_overflow("logit gradient", count_overflow(ds * row_scale) + count_overflow(ds * group_scale))
        unit = v_descale / do_quant_scale * options.softmax_scale
        ds8 = saturating_cast(ds * row_scale).float() * (unit / row_scale)
        dq[:, :, rows] = _unfold(_fold(ds8, groups) @ keys[:, :, columns], groups) * k_descale
        ds8 = saturating_cast(ds * group_scale).float() * (unit / group_scale)
        dk[:, :, columns] += _fold(ds8, groups).mT @ _fold(q_rows * q_descale, groups)
        do = do8 / (do_quant_scale * PROBABILITY_QUANT_SCALE * survival)
        dv[:, :, columns] += _fold(p8, groups).mT @ _fold(do, groups)
    if options.incoherent:
        dq, dk = hadamard(dq), hadamard(dk)
    return dq, dk, dv


__all__ = ["Operands", "Options", "backward", "forward", "gradient_scales", "logit_gradient_quant_scale", "quantize"]
