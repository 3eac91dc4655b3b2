"""Head-wise slices of the weights that make the logits: their norms, and writes to them, sharded by FSDP2 or not.

A slice is a set of rows (columns in a Conv1D) of one weight, and of the bias beside it. Slices are numbered through the model, so
that a norm or a factor of every slice is one vector, and all layers together cost one collective.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

UNCONTROLLED = -1
"""Label of rows that belong to no slice: those that make values."""


@dataclass(frozen=True, eq=False)
class HeadPart:
    """What this process holds of a parameter: the whole, or the rows of its shard."""

    local: Tensor
    dim: int
    labels: Tensor  # (rows here,)
    runs: Tensor  # (runs,) the label of each run of equal labels
    lengths: Tensor  # (runs,)
    group: Any  # process group over which the rows are spread; None: all are here

    def per_row(self, factors: Tensor) -> Tensor:
        """Factors (slots,) as float32 or wider that broadcasts against `local`; 1 where no slice is."""
        extended = torch.cat([factors, factors.new_ones(1)]).to(self.local.device)  # the last is for UNCONTROLLED = -1
        rows = extended[self.labels].to(torch.promote_types(self.local.dtype, torch.float32))
        return rows.view([-1 if d == self.dim else 1 for d in range(self.local.dim())])

    def add_squares(self, totals: Tensor) -> None:
        """Add ‖rows here‖² of each slice to (slots + 1,) float64, whose last entry is left alone.

        Sums run in a fixed order, so that replicas on several processes keep the same bits.
        """
        if not self.labels.numel():
            return
        wide = torch.promote_types(self.local.dtype, torch.float32)
        rows = torch.linalg.vector_norm(self.local, dim=1 - self.dim, dtype=wide).double().square()
        sums = torch.segment_reduce(rows, "sum", lengths=self.lengths, unsafe=True)
        sums = torch.where(self.runs == UNCONTROLLED, 0.0, sums)  # the one label that may occur twice
        totals[self.runs.to(totals.device)] += sums.to(totals.device)


@dataclass(eq=False)
class HeadSlices:
    """A weight or bias and the slice that each of its rows (columns if dim = 1) belongs to.

    Args:
        owner: module from which `path` leads to the parameter, looked up at each use: FSDP2 replaces parameters.
        labels: (rows,) int64, the slice of each row or UNCONTROLLED; the rows of a slice lie together.
        dim: 0 for nn.Linear and biases, 1 for transformers' Conv1D.
        name: for messages.
    """

    owner: nn.Module
    path: str
    labels: Tensor
    dim: int
    name: str
    _runs: dict = field(default_factory=dict, repr=False)  # (first row, rows, device) → labels, runs, lengths

    @property
    def parameter(self) -> Any:
        """Today's parameter. Raises ValueError, naming the remedy, where its rows cannot be told apart any more."""
        parameter = operator.attrgetter(self.path)(self.owner)
        if parameter.dim() <= self.dim or parameter.shape[self.dim] != len(self.labels):
            raise ValueError(
                f"{self.name} must have {len(self.labels)} entries along dimension {self.dim}, its shape is now "
                f"{tuple(parameter.shape)}. FSDP1 and DeepSpeed ZeRO-3 hide weights in flat shards: use FSDP2 (fully_shard)"
            )
        return parameter

    def part(self) -> HeadPart:
        """What is here of it. Raises ValueError for a weight sharded otherwise than by FSDP2."""
        parameter, rows = self.parameter, len(self.labels)
        if not hasattr(parameter, "full_tensor"):
            return HeadPart(parameter.detach(), self.dim, *self._local(0, rows, parameter.device), None)
        group, rank, size = _sharding(parameter, self.name)
        local, first = parameter.detach().to_local(), 0
        if self.dim == 0 and group is not None:
            first, rows = min(rank * -(-rows // size), rows), local.shape[0]
        return HeadPart(local, self.dim, *self._local(first, rows, local.device), group)

    def _local(self, first: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        key = first, rows, device
        if key not in self._runs:
            labels = self.labels[first : first + rows]
            runs, lengths = torch.unique_consecutive(labels, return_counts=True)
            self._runs[key] = labels.to(device), runs.to(device), lengths.to(device)
        return self._runs[key]


def _sharding(parameter: Any, name: str) -> tuple[Any, int, int]:
    """Process group, rank and size of a DTensor's sharding along dimension 0; None, 0, 1 where it is replicated."""
    sharded = [(axis, p) for axis, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not sharded:
        return None, 0, 1
    if len(sharded) > 1 or type(sharded[0][1]).__name__ != "Shard" or sharded[0][1].dim != 0:
        raise ValueError(
            f"{name} must be whole, or sharded along dimension 0 as FSDP2 does; its placements are {parameter.placements}. "
            "Tensor parallelism is not supported"
        )
    axis, mesh = sharded[0][0], parameter.device_mesh
    return mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis)


@dataclass(eq=False)
class LogitWeights:
    """The slices of a model that make its logits, and how a change of each reaches them.

    Args:
        weights: their norms count; biases: they follow the factors of their rows only.
        names: of the slices, for messages; a slice's number is its place here.
        products: (slice, others): a change of the slice by 1 changes a logit by at most the product of the norms of the others, up
            to what does not depend on the weights. A slice may occur several times; its largest product counts.
        normalised: slices whose output a norm makes independent of their size, so that a change reaches the logits by 1/own norm.
    """

    weights: list[HeadSlices]
    biases: list[HeadSlices]
    names: list[str]
    products: list[tuple[int, tuple[int, ...]]]
    normalised: list[int] = field(default_factory=list)
    _tables: dict = field(
        default_factory=dict, repr=False
    )  # device → owners (T,), others (T, width), normalised (slots,)

    @property
    def parameters(self) -> list[HeadSlices]:
        return [*self.weights, *self.biases]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Frobenius norm of every slice of the weights, (slots,) float64; one all-reduce a mesh that shards them."""
        parts = [weight.part() for weight in self.weights]
        device, totals = parts[0].local.device, {}
        for part in parts:
            if part.group not in totals:
                totals[part.group] = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
            part.add_squares(totals[part.group])
        for group, squares in totals.items():
            if group is not None:
                dist.all_reduce(squares, group=group)
        return torch.stack(list(totals.values())).sum(0)[:-1].sqrt()

    def reach(
        self,
        norms: Tensor,  # (slots,)
    ) -> Tensor:
        """How far a change of each slice by 1 reaches: the largest product of the others' norms, over its own where a norm follows
        it, (slots,)."""
        owners, others, normalised = self._table(norms.device)
        products = torch.cat([norms, norms.new_ones(1)])[others].prod(dim=-1)
        reach = torch.zeros_like(norms).scatter_reduce(0, owners, products, "amax")
        return torch.where(normalised, reach / norms, reach)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            width, one = max(len(others) for _, others in self.products), len(self.names)
            rows = [[*others, *[one] * (width - len(others))] for _, others in self.products]
            owners = torch.tensor([owner for owner, _ in self.products], device=device)
            normalised = torch.zeros(one, dtype=torch.bool)
            normalised[self.normalised] = True
            self._tables[device] = owners, torch.tensor(rows, device=device), normalised.to(device)
        return self._tables[device]

    @torch.no_grad()
    def multiply(
        self,
        factors: Tensor,  # (slots,)
    ) -> None:
        """Multiply the rows of every slice, of weights and biases, in place."""
        for parameter in self.parameters:
            part = parameter.part()
            part.local.copy_(part.local * part.per_row(factors))
