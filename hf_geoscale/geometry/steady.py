"""The measurement of layers once more, of whatever their weights hold now: as `measure_layers`, without asking what they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .batch import arithmetic_of, constants_of_bounds
from .layer import LayerGeometry, LayerMaps, geometries_of, layers_together
from .spectral import SQUARINGS, WARM_ROUNDS
from .tensor_cores import SUM_WIDTH, MatrixKernels


@dataclass(frozen=True)
class SteadyBatch:
    """Layers of one shape that kernels measure where they lie, as long as they lie there. Holds none of their weights.

    Only layers whose certificate is that of their weights and gains: without offset, excess, factor or headroom.
    """

    kernels: MatrixKernels
    tables: Any  # of `MatrixKernels.tables`
    coefficients: Tensor  # (N, 5) float64, of `MatrixKernels.norm_bounds`
    counts: tuple[int, int, int]  # heads of q, k and v in a layer
    dim: int
    softmax_scales: tuple[float, ...]  # of each layer

    @classmethod
    def of(cls, layers: Sequence[LayerMaps], kernels: MatrixKernels) -> "SteadyBatch | None":
        """None for layers that this does not serve, alone or together."""
        maps = [layer.projections[i] for i in range(3) for layer in layers]
        shapes = {tuple(p.weight.shape[:2] for p in layer.projections) for layer in layers}
        devices = {p.weight.device for p in maps}
        if len(shapes) > 1 or len(devices) > 1:
            return None
        (heads,), (device,) = shapes, devices
        if not kernels.takes(heads[0][1], device):
            return None
        if not all(arithmetic_of(layer.projections) == "tensor cores" for layer in layers):
            return None
        if any(p.has_offset or p.excess is not None or p.rotary_factor != 1 for p in maps):
            return None
        if not all(kernels.can_read(p.weight, p.norm_gain) for p in maps):
            return None
        places = accumulate((p.weight.shape[0] for p in maps), initial=0)
        rows = [(p.weight, p.norm_gain, place) for p, place in zip(maps, places, strict=False)]
        (query_heads, dim), (key_heads, _), (value_heads, _) = heads
        counts = query_heads, key_heads, value_heads
        scales = tuple(layer.softmax_scale for layer in layers)
        return cls(kernels, kernels.tables(rows, device), constants_of_bounds(maps), counts, dim, scales)

    @property
    def layers(self) -> int:
        return len(self.softmax_scales)

    @classmethod
    def parts(cls, layers: Sequence[LayerMaps], kernels: MatrixKernels) -> "list[SteadyBatch] | None":
        """`of` as many layers at a time as `measure_layers` takes together; None if some are not served."""
        together = layers_together((len(p.weight), p.weight.shape[1]) for p in layers[0].projections)
        found = [cls.of(layers[i : i + together], kernels) for i in range(0, len(layers), together)]
        served = [part for part in found if part is not None]
        return served if len(served) == len(found) else None

    @property
    def usable(self) -> bool:
        """Whether launches from here on follow the upload of the tables."""
        return self.kernels.is_current(self.tables)

    def measure(
        self,
        vectors: Sequence[Tensor],  # (Hq, D) of each layer, of the last refresh
    ) -> list[LayerGeometry]:
        count, heads = len(vectors), self.counts[0]
        device = self.coefficients.device
        grams = torch.empty(count * sum(self.counts), self.dim, self.dim, dtype=torch.float32, device=device)
        self.kernels.grams_of(self.tables, grams, SUM_WIDTH)
        bound = self.kernels.norm_bounds(grams, self.coefficients, SQUARINGS)
        gram_q, gram_k, _ = grams.split([count * h for h in self.counts])
        start = torch.cat([v.to(grams) for v in vectors])
        lower, following = self.kernels.power_iteration(gram_q, gram_k, start, WARM_ROUNDS)
        lower, following = lower.view(count, heads), following.view(count, heads, self.dim)
        return geometries_of(self.counts, bound, self.softmax_scales, lower.unbind(), following.unbind())
