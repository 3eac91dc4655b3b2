"""Span scaling: gradients of q, k and v, split along and across the spans of their tokens, and the parts scaled.

A RECONSTRUCTION from the abstract of arXiv 2512.13033 (Kim, Yun, Yoon), whose body was not available: its projector, coefficients
and training set-up may differ from these. Letters: X one head's (L, D) queries, keys or values of one sequence, as the attention
sees them (after RoPE); dX their gradient; dS that of the (L, L) logits.

    Π_X = X (XᵀX + λI)⁻¹ Xᵀ,  λ = ridge · tr(XᵀX)/D        projector of token space onto the span of X's columns
                                                            (in float32 at least what rounding needs: `FLOAT32_RIDGE`)
    dX′ = a_parallel · Π_X dX + a_perpendicular · (dX − Π_X dX)

Why this splits the logits' gradient: dS = Π_Q dS Π_K + Π_Q dS Π_K^⊥ + Π_Q^⊥ dS Π_K + Π_Q^⊥ dS Π_K^⊥, of orders 0, 1, 1 and 2. As
Π_K K = K, dQ = dS K sees order 0, which is Π_Q dQ, and one order 1, which is Π_Q^⊥ dQ; dK sees order 0 and the other one. So
no L × L projector is formed: O(L·D²) a head, one D × D factorisation. dV is split by its own span, by analogy.
"""

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TARGETS = ("q", "k", "v")

RIDGE_MIN = 1e-5
"""Least ridge: of the operands' own directions, none weaker than 0.3 % of the root mean square counts for more than half."""

FLOAT32_RIDGE = 2.0**-23
"""Times √(L·D): least ridge in float32. Rounded sums of L products are off by about 2⁻²⁴√L of themselves, so XᵀX by twice that
times √D mean eigenvalues in spectral norm where one direction is all there is: with less there may be no Cholesky factor. A
guess for random errors, tested at rank one."""

Sequences = tuple[tuple[int, int, int], ...]
"""(row of the batch, first token, one past the last) of each sequence; no two overlap."""


@dataclass(frozen=True)
class SpanScaling:
    """How to scale the parts of dQ, dK and dV (a reconstruction from an abstract; see this module). Frozen.

    (1, 1) leaves the gradients alone, bit for bit. A sequence of at most D tokens spans all of its token space: its gradient
    is parallel but for the ridge. Under Adam a factor common to both parts changes no step of the projections' own weights;
    it does change what reaches the layers below, beside the residual stream.

    Args:
        a_parallel: factor ≥ 0 on the part in the operand's span; from 1 to 2 are the values to try.
        a_perpendicular: factor ≥ 0 on the rest; from 0 to 1.
        ridge: λ over the mean eigenvalue of XᵀX, at least 1e-5; directions of X weaker than √ridge of their root mean square count
            as outside its span. The default is a guess. Of 16-bit operands on a GPU it is at least 2⁻²³·√(L·D).
        targets: whose gradients to scale, of "q", "k" and "v".
    Raises:
        ValueError: a factor, ridge or target that is not as stated.
    """

    a_parallel: float
    a_perpendicular: float
    _: KW_ONLY
    ridge: float = 1e-4
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        for name in ("a_parallel", "a_perpendicular"):
            factor = getattr(self, name)
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"{name} must be a finite factor of at least 0, got {factor}")
        if not (math.isfinite(self.ridge) and self.ridge >= RIDGE_MIN):
            raise ValueError(f"ridge must be finite and at least {RIDGE_MIN:g}, got {self.ridge}")
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not targets or len(set(targets)) != len(targets) or not set(targets) <= set(TARGETS):
            raise ValueError(f"targets must be one or more of {TARGETS}, each once, got {self.targets!r}")
        object.__setattr__(self, "targets", targets)

    @property
    def is_identity(self) -> bool:
        """Whether both factors are 1: nothing to apply."""
        return self.a_parallel == self.a_perpendicular == 1

    def basis(
        self,
        x: Tensor,  # (..., L, D)
    ) -> Tensor:
        """What spans the parallel part, (..., L, D): the operand itself. Controls override it."""
        return x

    def scale(
        self,
        grad: Tensor,  # (..., L, D)
        x: Tensor,  # (..., L, D)
    ) -> Tensor:
        """dX′ of gradients of x, each (L, D) a sequence of its own: (..., L, D) in grad's dtype; in float64 inside, on a GPU in
        float32 for 16-bit operands.
        """
        # On many GPUs float64 is slow. There products of 16-bit numbers are exact in float32 and in TF32, others not.
        exact = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        wide = torch.promote_types(grad.dtype, torch.float32) if exact else torch.float64
        scaled = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        if self.a_parallel == self.a_perpendicular:
            return scaled.mul_(self.a_parallel).to(grad.dtype)
        basis = self.basis(x).to(wide, memory_format=torch.contiguous_format).contiguous()
        inside = coefficients(scaled, basis, self.ridge)
        rest, span, inside = (y.view(-1, *y.shape[-2:]) for y in (scaled, basis, inside))
        rest.baddbmm_(span, inside, beta=self.a_perpendicular, alpha=self.a_parallel - self.a_perpendicular)
        return scaled.to(grad.dtype)


def coefficients(
    grad: Tensor,  # (..., L, D)
    basis: Tensor,  # (..., L, D)
    ridge: float,
) -> Tensor:
    """(XᵀX + λI)⁻¹ Xᵀ dX for X = basis, (..., D, D), so that X times it is Π_X dX; 0 where X is 0. Waits for no device."""
    gram = basis.mT @ basis
    if gram.dtype == torch.float32:
        ridge = max(ridge, FLOAT32_RIDGE * math.sqrt(basis.shape[-2] * basis.shape[-1]))
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean == 0, 1, mean)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram / mean + ridge * identity).L
    # Two triangular solves: torch.cholesky_solve runs matrix by matrix on a GPU.
    half = torch.linalg.solve_triangular(factor, basis.mT @ grad / mean, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).contiguous()


class _SpanScaled(torch.autograd.Function):
    """x as it is; its gradient scaled. Keeps x itself: FP8 copies span less exactly (docs/span_operands.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: SpanScaling, sequences: Sequences | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scaling, ctx.sequences = scaling, sequences
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.sequences is None:
                return ctx.scaling.scale(grad, x), None, None
            scaled = grad.clone()
            for row, start, stop in ctx.sequences:
                part = row, slice(None), slice(start, stop)
                scaled[part] = ctx.scaling.scale(grad[part], x[part])
        return scaled, None, None


def _check(name: str, x: Tensor, sequences: Iterable[tuple[int, int, int]] | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
    seen: dict[int, int] = {}
    for row, start, stop in sorted(sequences or ()):
        if not (0 <= row < x.shape[0] and seen.get(row, 0) <= start < stop <= x.shape[2]):
            raise ValueError(
                f"sequences of {name} must be (row, start, stop) within {x.shape[0]} rows of {x.shape[2]} tokens, none empty "
                f"and none overlapping, got {(row, start, stop)}"
            )
        seen[row] = stop


def scale_span_gradients(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    scaling: SpanScaling,
    *,
    query_sequences: Sequences | None = None,
    key_sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operands for any attention function, `fp8_attention` or another, whose gradients will be scaled on their way back.

    The forward is untouched. Every scaled operand is kept for the backward: 2·D bytes a token and head in BF16.

    Args:
        query, key, value: any floating dtype and strides, as the attention will read them.
        scaling: factors, ridge and targets. Operands that are no target or need no gradient come back as they are.
        query_sequences, key_sequences: where the sequences of a padded or packed batch lie; the gradient of tokens in none of
            them is left alone. None: each row of the batch is one.
    Returns:
        The three operands, the same bits.
    Raises:
        ValueError: an operand that is not 4D, or sequences that lie outside, overlap or are empty.
    """
    operands = []
    for name, x, sequences in (
        ("query", query, query_sequences),
        ("key", key, key_sequences),
        ("value", value, key_sequences),
    ):
        _check(name, x, sequences)
        applies = name[0] in scaling.targets and not scaling.is_identity and x.requires_grad and torch.is_grad_enabled()
        operands.append(_SpanScaled.apply(x, scaling, sequences) if applies else x)
    return operands[0], operands[1], operands[2]
