"""What bounds a token that no norm layer precedes: the residual stream of post-norm decoders (OLMo 2 and 3, FlexOlmo, EXAONE 4)."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedAttentionError, UnsupportedModelError
from ..geometry.certificates import UNIT_ROUNDOFF
from .norms import gain_and_shift
from .sharding import is_partitioned
from .upward import Upward
from .weights import active_module

ROWS = 4096
"""Embedding rows whose norms are taken at a time, so that no second embedding is ever stored."""

FLOAT32_SUM = 2.0**-10
"""Relative allowance for a float32 sum of at most 2¹³ squares, in any order: 2¹³·2⁻²⁴, doubled twice."""


_HARMLESS_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad"}
"""Of transformers' and PEFT's gradient checkpointing."""


@dataclass(frozen=True)
class ResidualStream:
    """The stream as it enters one layer, h = E[token] + Σ y_j over the sublayers before; each y_j leaves a norm layer.

    ‖h‖₂ ≤ max_t ‖E[t]‖₂ + Σ_j √d·max|γ_j|. In BF16 a y_j gains three roundings (norm, cast, gain) and each of the J sums one:
    a factor (1 + 2⁻⁸)^(J + 3). It assumes tokens from the embedding; `refuse_embeddings` holds callers to that.
    """

    home: Upward  # to the model; its embedding is looked up at each use, too
    norms: tuple[tuple[Upward, str], ...]  # (to a block, attribute), looked up at each use

    @property
    def embedding(self) -> Any:
        return active_module(_around(self.home).get_input_embeddings())

    @property
    def modules(self) -> list[Any]:
        """Modules whose parameters decide the bound, wrappers included."""
        return [_around(self.home).get_input_embeddings(), *(getattr(_around(b), name) for b, name in self.norms)]

    @torch.no_grad()
    def norm_bound(self, where: str) -> Tensor:
        """Certificate of ‖h‖₂: () float64. Raises UnsupportedModelError for modules we do not know."""
        embedding = self.embedding
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise UnsupportedModelError(
                f"{where} has no norm layer in front, and its tokens come from a {type(embedding).__name__}, not a plain "
                "nn.Embedding, so nothing bounds them"
            )
        weight = embedding.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = [torch.linalg.vector_norm(part, dim=1, dtype=dtype).amax() for part in weight.split(ROWS)]
        bound = torch.stack(rows).amax().double() * (1 + FLOAT32_SUM)
        for block, name in self.norms:
            gain, shift = gain_and_shift(getattr(_around(block), name), f"{name} before {where}")
            if gain is None or shift is not None:
                raise UnsupportedModelError(f"{name} before {where} must have a gain and no shift")
            bound = bound + math.sqrt(gain.numel()) * gain.detach().double().abs().amax().to(bound.device)
        return bound * (1 + UNIT_ROUNDOFF) ** (len(self.norms) + 3)


def residual_stream(home: Upward, blocks: Sequence[Upward], names: tuple[str, ...]) -> ResidualStream:
    """The stream of the model `home` after `blocks`, whose sublayers end in the norm layers `names`."""
    return ResidualStream(home, tuple((block, name) for block in blocks for name in names))


def _around(upward: Upward) -> Any:
    """The module, while it is there."""
    if (module := upward.target()) is None:
        raise UnsupportedModelError(
            "a layer without a norm in front was copied out of its model, whose embedding and earlier norms bound its tokens: "
            "call hf_geoscale.patch_model(model) on the model that it is in now"
        )
    return module


def refuse_embeddings(module: Any, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a post-norm decoder: certificates there start at rows of its embedding, unchanged by hooks."""
    embedding = module.get_input_embeddings()
    if any(map(is_partitioned, embedding.parameters())):
        return  # DeepSpeed's hooks; the first layer refuses its sharding by name
    hooks = [getattr(hook, "__name__", type(hook).__name__) for hook in embedding._forward_hooks.values()]
    changing = [name for name in hooks if name not in _HARMLESS_HOOKS]
    if changing:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} has no norm layer before its attention: the certificates of v start at the rows of its "
            f"embedding, and a forward hook there ({changing[0]}; NEFTune is one) may change them. Remove it, or unpatch the model"
        )
    if inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("inputs_embeds") is not None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} has no norm layer before its attention: the certificates of v start at the rows of its "
            "embedding, and inputs_embeds could be of any size. Pass input_ids, or unpatch the model"
        )
