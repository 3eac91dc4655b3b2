"""One causal head of FP8 attention, forward and backward, whose products run in the matrix unit of `accumulator`.

Tiles come from the kernels' own tables. Sums have the order of the kernels: keys from the first to the last for O and dQ, rows from
the first to the last for dK and dV. Only the rows and keys that a test asks for are computed.
"""

import importlib
import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from hf_geoscale.kernels import reference
from hf_geoscale.kernels.hadamard import hadamard
from hf_geoscale.kernels.operands import Options, quantize
from hf_geoscale.kernels.statistics import AttentionStatistics
from hf_geoscale.kernels.tiles import Tiles
from hf_geoscale.scaling.formats import saturating_cast

from .accumulator import RunningSum, fp8_matmul
from .samples import scales

PROBABILITY_LOG2 = math.log2(reference.PROBABILITY_QUANT_SCALE)

BLOCK_ROWS = 64
"""Query rows that the kernels handle together."""


@dataclass(frozen=True)
class Tiling:
    """Positions of the sequence that share an accumulator of the matrix unit, by what they sum to, and channels of S and dP."""

    forward: int  # keys, of O
    query_gradient: int  # keys
    key_gradient: int  # rows, a multiple of those of dV
    value_gradient: int  # rows, of one tile
    channels: int | None = None  # in S and dP, that share an accumulator; None: all of them


def hopper_launch() -> ModuleType:
    """The launches of the Hopper kernels, also where the package leaves them out (an interpreter, no such GPU)."""
    package = importlib.import_module("hf_geoscale.kernels.hopper")
    before = package.launch
    try:
        return importlib.import_module("hf_geoscale.kernels.hopper.launch")
    finally:
        package.launch = before


def hopper_tilings() -> dict[int, Tiling]:
    """Of the Hopper kernels, by padded head dimension."""
    launch = hopper_launch()
    return {
        dim: Tiling(
            rings.forward.promotion,
            launch.QUERY_PRODUCT.get(dim, rings.query_gradient).promotion,
            rings.key_gradient.promotion,
            rings.key_gradient.length,
        )
        for dim, rings in launch.TABLE.items()
    }


def portable_tiling(tiles: Tiles) -> Tiling:
    """Of the portable kernels, for a row of their tables."""
    return Tiling(tiles.forward.keys, tiles.query_gradient.keys, tiles.key_gradient.rows, tiles.key_gradient.rows)


def blocks(start: int, stop: int, length: int) -> list[slice]:
    return [slice(i, min(i + length, stop)) for i in range(start, stop, length)]


@dataclass(frozen=True)
class Rows:
    """Some query rows after the forward: (R, D) O as BF16, (R, 1) row maxima of the base-2 logits, (R, 1) row sums of P̃."""

    index: Tensor  # (R,) ascending
    out: Tensor
    largest: Tensor
    row_sum: Tensor


class AttentionModel:
    """O, dQ, dK, dV of some rows and keys of one causal head.

    Args:
        q, k, v, grad: (L, D) BF16.
        tiling: what each product contracts.
        promoted: whether float32 takes each tile's product; otherwise one accumulator takes a whole row or column.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tiling: Tiling, promoted: bool):
        self.tiling, self.promoted, self.grad = tiling, promoted, grad.float()
        self.length, self.dim = q.shape
        heads = [x.detach()[None, None] for x in (q, k, v)]
        quant_scales = [scales(*heads)[f"{name}_quant_scale"] for name in "qkv"]
        options = Options(self.dim**-0.5)
        operands = quantize(*heads, *quant_scales, None, options, "standard", AttentionStatistics())
        self.q8, self.k8, self.v8 = (x[0, 0].float() for x in (operands.q8, operands.k8, operands.v8))
        self.q_descale, self.k_descale, self.v_descale = (float(1 / x) for x in quant_scales)
        self.softmax_scale = options.softmax_scale
        self.factor = self.q_descale * self.k_descale * self.softmax_scale * math.log2(math.e)
        self.v_norm = self.v8.norm(dim=-1).amax()

    @cached_property
    def scales_of_groups(self) -> tuple[Tensor, Tensor]:
        """quant_scale of dO′ and of dS in dK, by group of rows: (groups,) each, from row sums of exact products."""
        sums = []
        for rows in torch.arange(self.length).split(512):
            s = self.q8[rows] @ self.k8.T * self.factor
            s.masked_fill_(torch.arange(self.length) > rows[:, None], -math.inf)
            sums.append(torch.exp2(s - s.amax(1, keepdim=True)).sum(1))
        quant_scale, norm = reference.gradient_scales(self.grad[None, None], torch.cat(sums)[None, None])
        return quant_scale[0, 0], reference.logit_gradient_quant_scale(norm, self.v_norm, 1.0)[0, 0]

    def _sum(self, rows: int, tile: int) -> RunningSum:
        return RunningSum(rows, self.dim, tile if self.promoted else None)

    def _over_channels(self, a8: Tensor, b8: Tensor) -> Tensor:
        """a8·b8ᵀ of one tile, S or dP: (M, D) and (N, D) → (M, N)."""
        return fp8_matmul(a8, b8.T, self.tiling.channels)

    def _logits(self, rows: Tensor, keys: slice) -> Tensor:
        """q8·k8 of rows (R,), −∞ where hidden: (R, K)."""
        position = torch.arange(keys.start, keys.stop)
        return self._over_channels(self.q8[rows], self.k8[keys]).masked_fill_(position > rows[:, None], -math.inf)

    def forward(self, index: Tensor) -> Rows:
        """Rows (R,), ascending, in blocks of 64 as the kernels have them."""
        parts = [self._forward(rows) for rows in index.split(BLOCK_ROWS)]
        return Rows(index, *(torch.cat(x) for x in zip(*parts, strict=True)))

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = self._sum(len(rows), self.tiling.forward)
        largest, row_sum = torch.full((len(rows), 1), -(2.0**100)), torch.zeros(len(rows), 1)
        for keys in blocks(0, int(rows[-1]) + 1, self.tiling.forward):
            s = self._logits(rows, keys)
            new = torch.maximum(largest, s.amax(1, keepdim=True))
            p = torch.exp2(s * self.factor - (new * self.factor - PROBABILITY_LOG2))
            rescale = torch.exp2((largest - new) * self.factor)
            row_sum = row_sum * rescale + p.sum(1, keepdim=True)
            sums.rescale(rescale)
            sums.add(saturating_cast(p), self.v8[keys])
            largest = new
        out = (sums.value() * (self.v_descale / row_sum)).bfloat16()
        return out, largest * self.factor, row_sum / reference.PROBABILITY_QUANT_SCALE

    def _gradient(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """dO′8 (R, D) in float32, its quant_scale and δ in units of dO′8·v8 (R, 1)."""
        quant_scale = self.scales_of_groups[0][rows.index // reference.GRADIENT_ROWS, None]
        do8 = saturating_cast(self.grad[rows.index] / rows.row_sum * quant_scale).float()
        return do8, quant_scale, (do8 * rows.out.float()).sum(-1, keepdim=True) / self.v_descale

    def query_gradient(self, rows: Rows) -> Tensor:
        """dQ of these rows: (R, D)."""
        tile, parts = self.tiling.query_gradient, []
        do8, quant_scale, delta = self._gradient(rows)
        row_scale = reference.logit_gradient_quant_scale(do8.norm(dim=-1, keepdim=True), self.v_norm, 1.0)
        for some in blocks(0, len(rows.index), BLOCK_ROWS):
            index = rows.index[some]
            sums = self._sum(len(index), tile)
            for keys in blocks(0, int(index[-1]) + 1, tile):
                p = torch.exp2(self._logits(index, keys) * self.factor - rows.largest[some])
                ds = p * (self._over_channels(do8[some], self.v8[keys]) - delta[some]) * row_scale[some]
                sums.add(saturating_cast(ds), self.k8[keys])
            parts.append(sums.value())
        unit = self.v_descale / quant_scale * self.softmax_scale / row_scale * self.k_descale
        return hadamard((torch.cat(parts) * unit)[None, None])[0, 0]

    def key_gradient(self, keys: slice, rows: Rows) -> tuple[Tensor, Tensor]:
        """dK and dV (K, D) of some keys; `rows` are all rows from those of the first of these keys' tile on."""
        tile = self.tiling.value_gradient
        dk, dv = (self._sum(keys.stop - keys.start, length) for length in (self.tiling.key_gradient, tile))
        dk_unit = dv_unit = torch.ones(())
        do8, quant_scale, delta = self._gradient(rows)
        for some in blocks(0, len(rows.index), tile):
            index = rows.index[some]
            group_scale = self.scales_of_groups[1][index[0] // reference.GRADIENT_ROWS]
            new_dk_unit = self.v_descale / quant_scale[some.start] * self.softmax_scale / group_scale * self.q_descale
            new_dv_unit = 1 / (quant_scale[some.start] * reference.PROBABILITY_QUANT_SCALE)
            dk.rescale(dk_unit / new_dk_unit)
            dv.rescale(dv_unit / new_dv_unit)
            dk_unit, dv_unit = new_dk_unit, new_dv_unit
            p = torch.exp2(self._logits(index, keys) * self.factor - rows.largest[some])
            ds = p * (self._over_channels(do8[some], self.v8[keys]) - delta[some]) * group_scale
            dk.add(saturating_cast(ds).T, self.q8[index])
            dv.add(saturating_cast(p * reference.PROBABILITY_QUANT_SCALE).T, do8[some])
        return hadamard((dk.value() * dk_unit)[None, None])[0, 0], dv.value() * dv_unit
