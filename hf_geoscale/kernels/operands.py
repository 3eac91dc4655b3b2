"""What an attention call is made of: its FP8 operands and its options."""

from dataclasses import dataclass

from torch import Tensor

from ..scaling.formats import E4M3, count_overflow, saturating_cast
from .hadamard import hadamard
from .statistics import AttentionStatistics

RESIDUAL_GAIN = 16.0
"""The second FP8 term of k holds 16 × the first one's rounding error: at most half a unit in the last place, 16·16 = 256."""


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
    logit_quant_scale: Tensor | None = None  # (Hq,) of S in natural units, where logits are quantised too

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
    softcap: float | None = None


def quantize_operand(
    x: Tensor,  # (B, H, L, D)
    quant_scale: Tensor,  # (H,)
    mix: bool,
    name: str,
    statistics: AttentionStatistics,
) -> Tensor:
    """x·quant_scale in float32, after the Hadamard mix when `mix`; overflow and range are recorded: (B, H, L, D)."""
    scaled = (hadamard(x) if mix else x.float()) * quant_scale[:, None, None]
    statistics.add_overflow(name, count_overflow(scaled))
    statistics.add_range(name, scaled.abs().amax(dim=(0, 2, 3)) / E4M3.max)
    return scaled


def quantize(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    q_quant_scale: Tensor,  # (Hq,)
    k_quant_scale: Tensor,  # (Hkv,)
    v_quant_scale: Tensor,  # (Hkv,)
    logit_quant_scale: Tensor | None,  # (Hq,)
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
    descales = (1 / q_quant_scale, 1 / k_quant_scale, 1 / v_quant_scale)
    return Operands(saturating_cast(q), k8, saturating_cast(v), residual, *descales, logit_quant_scale)
