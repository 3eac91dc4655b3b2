"""Largest logits of an unpatched model: its own attention implementation, with a look at q and k on the way."""

import sys
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .implementation import own_configs

OBSERVABLE = ("sdpa", "eager")
"""Implementations whose masks say which pairs are visible; FlashAttention's do not."""

CHUNK_ENTRIES = 2**25
"""Logits made at once: 64 MiB in BF16 (a guess)."""


@torch.no_grad()
def logit_amax(
    query: Tensor,  # (B, Hq, L, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    mask: Tensor | None,  # (B or 1, Hq or 1, L, Lk) bool or added to the logits
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """Largest visible |q·k|·softmax_scale of every query head, in chunks of rows: (Hq,) float32."""
    batch, heads, length, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    rows = max(1, CHUNK_ENTRIES // (batch * heads * keys))
    largest = torch.zeros(heads, device=query.device)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        logits = (grouped[:, :, :, start:stop] @ key[:, :, None].mT).reshape(batch, heads, -1, keys).float().abs()
        if mask is not None:
            seen = mask[:, :, start:stop, :keys]
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
            logits = logits.masked_fill(~seen, 0.0)
        elif causal:
            logits = logits.tril(start + keys - length)
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)))
    return largest * softmax_scale


class LogitObserver:
    """Keeps the largest logits of training forwards of an unpatched model, until `remove`.

    Costs a second q·kᵀ a forward. The model gets its own copy of its config, where the name of the attention lives.

    Raises:
        ValueError: an attention implementation other than "sdpa" and "eager".
    """

    def __init__(self, model: Any, modules: list[nn.Module]):
        self._model, self._modules = ref(model), [ref(module) for module in modules]  # which hold this
        self.original = model.config._attn_implementation
        if self.original not in OBSERVABLE:
            raise ValueError(
                f"logits can be observed under attn_implementation {' or '.join(map(repr, OBSERVABLE))}, the model runs "
                f"{self.original!r}. Load it with one of them, or patch_model(model, observe_logits=True)"
            )
        self.amax: dict[int, Tensor] = {}  # id of the attention module → (Hq,)
        name = f"observed_{self.original}"
        AttentionInterface.register(name, torch.compiler.disable(partial(_observe, self.original)))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.original])
        for module in modules:
            module.__dict__["logit_observer"] = self
        own_configs(model, [model.config])
        model.set_attn_implementation(name)

    def remove(self) -> None:
        """Give the model its own attention implementation back."""
        for module in self._living():
            module.__dict__.pop("logit_observer", None)
        if (model := self._model()) is not None:
            model.set_attn_implementation(self.original)

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copied or pickled model is not observed

    def _living(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]

    def add(self, module: nn.Module, amax: Tensor) -> None:
        old = self.amax.get(id(module))
        self.amax[id(module)] = amax if old is None else torch.maximum(old, amax.to(old.device))

    def drain(self) -> list[Tensor] | None:
        """Largest logits of each module since the last call; None unless every module ran."""
        found, self.amax = self.amax, {}
        if len(found) < len(self._modules):
            return None
        return [found[id(module)] for module in self._living()]


def _observe(original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask, **call: Any):
    observer = module.__dict__.get("logit_observer")
    scaling = call.get("scaling")
    if observer is not None and module.training:
        causal = call.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        observer.add(module, logit_amax(query, key, attention_mask, softmax_scale, causal))
    own: Any = sys.modules[type(module).__module__]  # eager attention is a function of each family
    attend: Any = own.eager_attention_forward if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
    return attend(module, query, key, value, attention_mask, **call)
