"""The geometry of attention layers: all bounds of one refresh."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .batch import Arithmetic, MapBounds, arithmetic_of, measure_maps
from .certificates import ROUNDING_MARGIN, Projection, logit_bound
from .spectral import (
    COLD_ROUNDS,
    WARM_ROUNDS,
    gram,
    gram_power_iteration,
    interaction_sigma_upper,
    start_vectors,
)
from .tensor_cores import MatrixKernels

GRAM_ENTRIES = 2**24
"""Entries of Gram matrices measured together; the chain over them holds about four such buffers, 256 MiB in float32."""


@dataclass(frozen=True)
class LayerGeometry:
    """Bounds of one layer, float64, on the weights' device. Bounds hold for every input (see `certificates`).

    `sigma_lower` is of the interaction A_Qᵀ A_K without RoPE, for monitoring. On tensor cores it is that of the weights rounded to
    BF16, which may lie a little above the weights' own.
    """

    q_bound: Tensor  # (Hq,)
    k_bound: Tensor  # (Hkv,)
    v_bound: Tensor  # (Hkv,)
    softmax_scale: float
    sigma_lower: Tensor  # (Hq,)
    vectors: Tensor  # (Hq, D) warm start of the next refresh
    weight_drift: Tensor | None = None  # () see `weight_drift_budget`; None without headroom
    worst_case_logit: Tensor | None = None  # (Hq,) B₁, where it was asked for; bounds a logit only without RoPE

    @cached_property
    def logit_bound(self) -> Tensor:
        """Certificate of |logit|: (Hq,)."""
        return logit_bound(self.q_bound, self.k_bound, self.softmax_scale)

    @property
    def max_weight_drift(self) -> float:
        """`weight_drift` as a number, 0 without headroom; waits for the device."""
        return 0.0 if self.weight_drift is None else float(self.weight_drift)


@dataclass(frozen=True)
class LayerMaps:
    """What `measure_layers` needs of one layer."""

    query: Projection
    key: Projection
    value: Projection
    softmax_scale: float  # factor on q·k, dimensionless (usually D^-½)
    vectors: Tensor | None = None  # (Hq, D) of the last refresh; None starts cold

    @property
    def projections(self) -> tuple[Projection, Projection, Projection]:
        return self.query, self.key, self.value


def augment(
    matrix: Tensor,  # (H, D, d)
    offset: Tensor,  # (H, D)
) -> Tensor:
    """[A c], so that A u + c = [A c][u 1]ᵀ and ‖[u 1]‖² ≤ d + 1: (H, D, d + 1)."""
    return torch.cat([matrix, offset[..., None]], dim=-1)


def weight_drift_budget(
    projection: Projection,
    bound: Tensor,  # (H,) its certificate
    headroom: float,
) -> Tensor:
    """Largest movement m of any single weight that cannot carry the operand past `headroom` × its bound: ().

    Moving every entry of W, g, β and b by at most m moves A by at most m·(√(D·d)·(max|g| + m) + σ(W)) and c by at most
    m·(√(D·d)·(‖β‖ + √d·m) + √d·σ(W) + √D). σ(W) ≤ ‖W‖_F. Solved with m ≤ 1, which any trained weight satisfies. The
    rounding terms of the certificate move by at most four unit roundoffs of that, and the margin multiplies all. 0 with an
    excess: adapters move W by products of weights, and what casts add moves too.
    """
    if projection.excess is not None:
        return bound.new_zeros(())
    weight = projection.weight.detach()
    _, dim, width = weight.shape
    gain = torch.ones((), dtype=torch.float64, device=weight.device)
    if projection.norm_gain is not None:
        gain = projection.norm_gain.detach().double().abs().amax()
    shift = torch.zeros_like(gain)
    if projection.norm_shift is not None:
        shift = projection.norm_shift.detach().double().norm()
    weight_norm = torch.linalg.vector_norm(weight, dim=(-2, -1), dtype=torch.float64)
    spread = (dim * width) ** 0.5
    slope = width**0.5 * (spread * (gain + 1) + weight_norm)
    if projection.norm_shift is not None or projection.bias is not None:
        slope = slope + spread * (shift + width**0.5) + width**0.5 * weight_norm + dim**0.5
    slope = slope * (1 + 2 * ROUNDING_MARGIN) * projection.rotary_factor
    return ((headroom - 1) * bound / slope).amin().clamp(max=1.0)


def measure_layer(
    query: Projection,
    key: Projection,
    value: Projection,
    softmax_scale: float,
    vectors: Tensor | None = None,  # (Hq, D) of the last refresh
    headroom: float = 1.0,
    interaction: bool = False,
    arithmetic: Arithmetic | None = None,
) -> LayerGeometry:
    """Bounds of one layer from its three projections: `measure_layers` of it alone."""
    layer = LayerMaps(query, key, value, softmax_scale, vectors)
    return measure_layers([layer], headroom, interaction, arithmetic)[0]


def measure_layers(
    layers: Sequence[LayerMaps],
    headroom: float = 1.0,
    interaction: bool = False,
    arithmetic: Arithmetic | None = None,
    kernels: MatrixKernels | None = None,
) -> list[LayerGeometry]:
    """Bounds of many layers, each as if it were measured alone (up to round-off), in about as many operations as of one.

    Layers of one head dimension and head count, on one device, are measured together. No value leaves the device.

    Args:
        headroom: factor the scales leave above the certificates, for `weight_drift`.
        interaction: also measure `worst_case_logit`.
        arithmetic: None decides by layer (`arithmetic_of`).
        kernels: used on tensor cores, where they take the shape and the device; else torch.
    Raises:
        ValueError: q and k of different widths.
    """
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        query, key, _ = layer.projections
        if query.weight.shape[-1] != key.weight.shape[-1]:
            widths = f"{query.weight.shape[-1]} and {key.weight.shape[-1]}"
            raise ValueError(f"q and k must see the same token, got widths {widths}")
        way = arithmetic or arithmetic_of(layer.projections)
        heads = tuple(p.weight.shape[:2] for p in layer.projections)
        groups.setdefault((way, query.weight.device, heads), []).append(index)
    found: dict[int, LayerGeometry] = {}
    for (way, device, heads), members in groups.items():
        together = layers_together(heads)
        for start in range(0, len(members), together):
            batch = members[start : start + together]
            usable = kernels if way == "tensor cores" and kernels and kernels.takes(heads[0][1], device) else None
            found |= zip(batch, _measure_together([layers[i] for i in batch], headroom, way, usable), strict=True)
    if interaction:
        for index, layer in enumerate(layers):
            worst_case = measure_interaction(layer.query, layer.key, layer.softmax_scale)[1]
            found[index] = replace(found[index], worst_case_logit=worst_case)
    return [found[index] for index in range(len(layers))]


def layers_together(
    heads: Iterable[tuple[int, int]],  # (H, D) of q, k and v
) -> int:
    """Layers of this shape whose Gram matrices are made at once."""
    return max(1, GRAM_ENTRIES // sum(count * dim**2 for count, dim in heads))


def _measure_together(
    layers: Sequence[LayerMaps], headroom: float, arithmetic: Arithmetic, kernels: MatrixKernels | None
) -> list[LayerGeometry]:
    """Geometry of layers of one shape on one device."""
    count, heads = len(layers), [p.weight.shape[0] for p in layers[0].projections]
    maps = [layer.projections[i] for i in range(3) for layer in layers]  # every q, then every k, then every v
    measured = measure_maps(maps, arithmetic, kernels)
    lower, vectors = _interactions(layers, measured, kernels)
    drifts: Sequence[Tensor | None] = ()
    if headroom > 1:
        certificates = measured.bound.split([h for h in heads for _ in layers])
        budgets = [weight_drift_budget(p, b, headroom) for p, b in zip(maps, certificates, strict=True)]
        drifts = torch.stack(budgets).view(3, count).amin(0).unbind()
    scales = [layer.softmax_scale for layer in layers]
    return geometries_of(heads, measured.bound, scales, lower, vectors, drifts)


def geometries_of(
    heads: Sequence[int],  # of q, k and v in a layer
    bound: Tensor,  # (N,) certificates of every q, then every k, then every v
    softmax_scales: Sequence[float],
    sigma_lower: Sequence[Tensor],  # (Hq,) of each layer, as the rest
    vectors: Sequence[Tensor],  # (Hq, D)
    drifts: Sequence[Tensor | None] = (),  # (), with headroom
) -> list[LayerGeometry]:
    """What was measured of layers of one shape, layer by layer."""
    count = len(softmax_scales)
    bounds = [part.view(count, -1).unbind() for part in bound.split([count * h for h in heads])]
    rest = softmax_scales, sigma_lower, vectors, drifts or [None] * count
    return [LayerGeometry(*fields) for fields in zip(*bounds, *rest, strict=True)]


def _interactions(
    layers: Sequence[LayerMaps], measured: MapBounds, kernels: MatrixKernels | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`sigma_lower` and the next start vectors of each layer, by power iteration on the Gram matrices alone."""
    count, (heads, dim, _), kv_heads = len(layers), layers[0].query.weight.shape, layers[0].key.weight.shape[0]
    gram_q, gram_k = measured.grams[: count * heads], measured.grams[count * heads :][: count * kv_heads]
    _add_offsets(gram_q, measured.offsets[:count])
    _add_offsets(gram_k, measured.offsets[count : 2 * count])
    vectors, rounds = [layer.vectors for layer in layers], WARM_ROUNDS
    if any(v is None or v.shape != (heads, dim) for v in vectors):
        cold, rounds = start_vectors(heads, dim), COLD_ROUNDS
        vectors = [cold if v is None or v.shape != (heads, dim) else v for v in vectors]
    start = torch.cat([v.to(gram_q) for v in vectors if v is not None])
    iterate = gram_power_iteration if kernels is None else kernels.power_iteration
    lower, vectors_next = iterate(gram_q, gram_k, start, rounds)
    lower = lower.double().view(count, heads)
    factors = [measured.factors[i] * measured.factors[count + i] for i in range(count)]
    parts = [part if factor == 1 else part * factor for part, factor in zip(lower.unbind(), factors, strict=True)]
    return tuple(parts), vectors_next.view(count, heads, dim).unbind()


def _add_offsets(
    grams: Tensor,  # (N, D, D), in place
    offsets: Sequence[Tensor | None],
) -> None:
    """A Aᵀ becomes [A c][A c]ᵀ = A Aᵀ + c cᵀ; the maps of these offsets have as many heads each."""
    if all(c is None for c in offsets):
        return
    zeros = grams.new_zeros(len(grams) // len(offsets), grams.shape[-1])
    columns = torch.cat([zeros if c is None else c.to(grams.dtype) for c in offsets])
    grams.baddbmm_(columns[:, :, None], columns[:, None])


def measure_interaction(query: Projection, key: Projection, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Upper bound of σ(A_Qᵀ A_K) and B₁ = σ·‖u‖²·softmax_scale of arXiv 2602.18851, both (Hq,) float64.

    With an offset the matrices gain it as a column and ‖[u 1]‖² ≤ d + 1. B₁ bounds a logit only without RoPE.
    """
    matrix_q, matrix_k = query.matrix(), key.matrix()
    if query.has_offset or key.has_offset:
        matrix_q, matrix_k = augment(matrix_q, query.offset()), augment(matrix_k, key.offset())
    sigma = interaction_sigma_upper(gram(matrix_q), gram(matrix_k))
    return sigma, sigma * matrix_q.shape[-1] * softmax_scale
