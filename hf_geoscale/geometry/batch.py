"""The geometry of many layers at once: weights are read once each, everything after their Gram matrices is one chain for all.

`Arithmetic` says how: "float64" as in `spectral`, or "tensor cores" as in `tensor_cores`, a few per cent looser, proven as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Literal

import torch
from torch import Tensor

from .certificates import ROUNDING_MARGIN, UNIT_ROUNDOFF, Projection
from .spectral import ROUNDING_ALLOWANCE, SQUARINGS, gram, sigma_upper
from .tensor_cores import (
    BF16_ROUNDOFF,
    SLACK,
    SUM_WIDTH,
    UNDERFLOW,
    MatrixKernels,
    half_looseness,
    half_trace_power_bound,
    partition,
    products,
    scaled_rows,
    sum_error,
)

Arithmetic = Literal["float64", "tensor cores"]

LARGE_LAYER = 2**20
"""Entries of the weights of a layer from which a GPU reads them in BF16; below, float64 costs nothing (a guess)."""

WORKSPACE = 2**25
"""Entries of BF16 weights scaled by their gains held at a time, 64 MiB: about an H100's second-level cache, 50 MiB (a guess)."""


def arithmetic_of(layer: Sequence[Projection]) -> Arithmetic:
    """How a layer of these maps is measured: on tensor cores where its weights are large and on a GPU."""
    plain = [p.weight for p in layer if p.weight.dtype != torch.float64]
    large = sum(w.numel() for w in plain) >= LARGE_LAYER and all(w.is_cuda for w in plain)
    return "tensor cores" if large else "float64"


@dataclass(frozen=True)
class MapBounds:
    """Of maps stacked along their heads, N in all. G and what is read off it leave out `factor` where it is not 1."""

    grams: Tensor  # (N, D, D) G = A Aᵀ / factor², float64 or float32
    bound: Tensor  # (N,) float64 certificate of `certificates.norm_bound`
    offsets: list[Tensor | None]  # of each map c / factor (H, D) float64, None for 0
    factors: list[float]  # of each map


def measure_maps(maps: Sequence[Projection], arithmetic: Arithmetic, kernels: MatrixKernels | None = None) -> MapBounds:
    """Gram matrices and certificates of maps with one head dimension on one device, in their order.

    Args:
        kernels: take the place of torch on tensor cores.
    """
    heads = tuple(p.weight.shape[0] for p in maps)
    device = maps[0].weight.device
    if arithmetic == "float64":
        grams, factors = torch.cat([gram(p.matrix()) for p in maps]), [1.0] * len(maps)
        sigma = sigma_upper(grams)
        frobenius = _trace(grams).sqrt() * (1 + ROUNDING_ALLOWANCE)
        reach = _per_head([math.sqrt(p.weight.shape[-1]) for p in maps], heads, device)
        bound = reach * (1 + ROUNDING_MARGIN) * (sigma + UNIT_ROUNDOFF * frobenius)
    else:
        grams, factors = _float32_grams(maps, heads, kernels), [p.rotary_factor for p in maps]
        bounds = _norm_bounds if kernels is None else kernels.norm_bounds
        bound = bounds(grams, constants_of_bounds(maps), SQUARINGS)
    offsets, shifted = _offsets(maps, heads)
    if shifted is not None:
        bound = bound + shifted * (1 + ROUNDING_MARGIN)
    own = [None if c is None else c / f if f != 1 else c for c, f in zip(offsets, factors, strict=True)]
    return MapBounds(grams, bound, own, factors)


def constants_of_bounds(maps: Sequence[Projection]) -> Tensor:
    """L, ε, u, a, b of `MatrixKernels.norm_bounds` for every head, (N, 5) float64."""
    heads = tuple(p.weight.shape[0] for p in maps)
    return _constants(tuple([_coefficients(p) for p in maps]), heads, maps[0].weight.device)


def _norm_bounds(grams: Tensor, coefficients: Tensor, squarings: int) -> Tensor:
    """As `MatrixKernels.norm_bounds`, in torch."""
    _, error, smallest, of_sigma, of_frobenius = coefficients.unbind(1)
    trace = _trace(grams)
    sigma = (half_trace_power_bound(grams, squarings) + error * trace).sqrt() + smallest
    return of_sigma * sigma + of_frobenius * (trace * (1 + error)).sqrt()


def _coefficients(p: Projection) -> tuple[float, ...]:
    """L, ε, u, a, b of `MatrixKernels.norm_bounds` that make it the certificate of a map without offset."""
    return _coefficients_of(*p.weight.shape[1:], p.weight.dtype, p.rotary_factor)


@lru_cache(maxsize=256)
def _coefficients_of(dim: int, width: int, dtype: torch.dtype, factor: float) -> tuple[float, ...]:
    reach = factor * math.sqrt(width) * (1 + ROUNDING_MARGIN)
    return half_looseness(dim), SLACK * sum_error(width), UNDERFLOW, reach, reach * _rounding(dtype)


def _rounding(dtype: torch.dtype) -> float:
    """What ‖A‖_F is multiplied by: the cast of W to BF16 when the model runs, and of A when its Gram matrix was taken.

    A weight stored in BF16 is cast in neither case but the second, and one in float64 only in the first.
    """
    if dtype == torch.float64:
        return UNIT_ROUNDOFF
    return SLACK * BF16_ROUNDOFF * (1 if dtype == torch.bfloat16 else 2)


def _trace(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)


def _float32_grams(maps: Sequence[Projection], heads: tuple[int, ...], kernels: MatrixKernels | None) -> Tensor:
    """Ĝ of every head, (N, D, D) float32; in torch `WORKSPACE` entries of the weights at a time."""
    dim, device = maps[0].weight.shape[1], maps[0].weight.device
    grams = torch.empty(sum(heads), dim, dim, dtype=torch.float32, device=device)
    rows = []
    placed = zip(maps, accumulate(heads, initial=0), strict=False)
    for readable, run in groupby(placed, lambda entry: _readable(entry[0], kernels, device)):
        members = list(run)
        if readable:
            rows += [(p.weight, p.norm_gain, place) for p, place in members]
        else:
            (last, place), start = members[-1], members[0][1]
            _grams_in_torch([p for p, _ in members], grams[start : place + last.weight.shape[0]])
    if kernels is not None and rows:
        kernels.grams(rows, grams, SUM_WIDTH)
    return grams


def _readable(p: Projection, kernels: MatrixKernels | None, device: torch.device) -> bool:
    return kernels is not None and p.weight.device == device and kernels.can_read(p.weight, p.norm_gain)


def _grams_in_torch(
    maps: Sequence[Projection],
    out: Tensor,  # (N, D, D) float32
) -> None:
    start = 0
    for width, run in groupby(maps, key=lambda p: 0 if p.weight.dtype == torch.float64 else p.weight.shape[-1]):
        for batch in [[p] for p in run] if width == 0 else _batches(list(run), WORKSPACE):
            stop = start + sum(p.weight.shape[0] for p in batch)
            if width == 0:  # small or read by dequantising: q/k norms, adapters
                (p,) = batch
                weight = p.weight.detach() if p.norm_gain is None else p.weight.detach() * p.norm_gain.detach().double()
                out[start:stop] = gram(weight)
            else:
                _scaled_grams(batch, out[start:stop])
            start = stop


def _batches(maps: list[Projection], entries: int) -> list[list[Projection]]:
    """Runs of maps with at most so many entries together, at least one map each."""
    batches: list[list[Projection]] = []
    held = 0
    for p in maps:
        if not batches or held + p.weight.numel() > entries:
            batches.append([])
            held = 0
        batches[-1].append(p)
        held += p.weight.numel()
    return batches


def _scaled_grams(
    maps: list[Projection],
    out: Tensor,  # (N, D, D) float32
) -> None:
    heads, (dim, width) = out.shape[0], maps[0].weight.shape[1:]
    parts, length = partition(width)
    rows = torch.empty(heads, parts, dim, length, dtype=torch.bfloat16, device=out.device)
    for p, own in zip(maps, rows.transpose(1, 2).split([p.weight.shape[0] for p in maps]), strict=True):
        scaled_rows(p.weight, p.norm_gain, own)
    torch.sum(products(rows.flatten(0, 1)).view(heads, parts, dim, dim), 1, out=out)


def _offsets(maps: Sequence[Projection], heads: tuple[int, ...]) -> tuple[list[Tensor | None], Tensor | None]:
    """c of each map, and what ‖c‖, its rounding and the excess add to the certificates: (N,) float64, None for nothing."""
    offsets: list[Tensor | None] = [None] * len(maps)
    biased = [i for i, p in enumerate(maps) if p.bias is not None and p.norm_shift is None]
    shifts: dict[int, Tensor] = {}
    if biased:  # all at once: ‖rounding‖ = 2·unit roundoff·‖b‖
        counts = [heads[i] for i in biased]
        bias = torch.cat([maps[i].bias.detach() for i in biased]).double()  # type: ignore[union-attr]
        factor = _per_head([maps[i].rotary_factor for i in biased], tuple(counts), bias.device)
        bias = bias * (factor[:, None] if isinstance(factor, Tensor) else factor)
        norms = (bias.norm(dim=-1) * (1 + 2 * UNIT_ROUNDOFF)).split(counts)
        for i, c, norm in zip(biased, bias.split(counts), norms, strict=True):
            offsets[i], shifts[i] = c, norm
    for i, p in enumerate(maps):
        if p.norm_shift is not None:
            offsets[i] = c = p.offset()
            shifts[i] = c.norm(dim=-1) + p.offset_rounding().norm(dim=-1)
        if p.excess is not None:
            deviation = p.deviation().norm(dim=-1)
            shifts[i] = shifts[i] + deviation if i in shifts else deviation
    if not shifts:
        return offsets, None
    zeros = next(iter(shifts.values())).new_zeros(max(heads))
    return offsets, torch.cat([shifts.get(i, zeros[:h]) for i, h in enumerate(heads)])


def _per_head(values: Sequence[float], heads: tuple[int, ...], device: torch.device) -> Tensor | float:
    """One value a map, as one a head: a float where all are equal, else (N,) float64 that stays on the device."""
    return values[0] if len(set(values)) == 1 else _constants(tuple(values), heads, device)


@lru_cache(maxsize=64)
def _constants(values: tuple, heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        repeated = [value for value, count in zip(values, heads, strict=True) for _ in range(count)]
        return torch.tensor(repeated, dtype=torch.float64).to(device)
