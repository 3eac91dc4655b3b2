"""What bounds a token that no norm layer precedes: the residual stream of post-norm decoders (OLMo 2 and 3, FlexOlmo, EXAONE 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedAttentionError, UnsupportedModelError
from ..geometry.certificates import UNIT_ROUNDOFF
from .norms import gain_and_shift

ROWS = 4096
"""Embedding rows whose norms are taken at a time, so that no second embedding is ever stored."""

FLOAT32_SUM = 2.0**-10
"""Relative allowance for a float32 sum of at most 2¹³ squares, in any order: 2¹³·2⁻²⁴, doubled twice."""


@dataclass(frozen=True)
class ResidualStream:
    """The stream as it enters one layer, h = E[token] + Σ y_j over the sublayers before; each y_j leaves a norm layer.

    ‖h‖₂ ≤ max_t ‖E[t]‖₂ + Σ_j √d·max|γ_j|. In BF16 a y_j gains three roundings (norm, cast, gain) and each of the J sums one:
    a factor (1 + 2⁻⁸)^(J + 3). It assumes tokens from the embedding; `refuse_embeddings` holds callers to that.
    """

    embedding: Any
    norms: tuple[tuple[Any, str], ...]  # (block, attribute), looked up at each use

    @property
    def modules(self) -> list[Any]:
        """Modules whose parameters decide the bound."""
        return [self.embedding, *(getattr(block, name) for block, name in self.norms)]

    @torch.no_grad()
    def norm_bound(self, where: str) -> Tensor:
        """Certificate of ‖h‖₂: () float64. Raises UnsupportedModelError for modules we do not know."""
        if type(self.embedding) is not nn.Embedding or self.embedding.max_norm is not None:
            raise UnsupportedModelError(
                f"{where} has no norm layer in front, and its tokens come from a {type(self.embedding).__name__}, not a plain "
                "nn.Embedding, so nothing bounds them"
            )
        weight = self.embedding.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = [torch.linalg.vector_norm(part, dim=1, dtype=dtype).amax() for part in weight.split(ROWS)]
        bound = torch.stack(rows).amax().double() * (1 + FLOAT32_SUM)
        for block, name in self.norms:
            gain, shift = gain_and_shift(getattr(block, name), f"{name} before {where}")
            if gain is None or shift is not None:
                raise UnsupportedModelError(f"{name} before {where} must have a gain and no shift")
            bound = bound + math.sqrt(gain.numel()) * gain.detach().double().abs().amax().to(bound.device)
        return bound * (1 + UNIT_ROUNDOFF) ** (len(self.norms) + 3)


def residual_stream(model: Any, blocks: Sequence[Any], names: tuple[str, ...]) -> ResidualStream:
    """The stream after `blocks`, whose sublayers end in the norm layers `names`."""
    return ResidualStream(model.get_input_embeddings(), tuple((block, name) for block in blocks for name in names))


def refuse_embeddings(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a post-norm decoder: certificates there start at rows of its embedding."""
    if kwargs.get("inputs_embeds") is not None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} has no norm layer before its attention: the certificates of v start at the rows of its "
            "embedding, and inputs_embeds could be of any size. Pass input_ids, or unpatch the model"
        )
