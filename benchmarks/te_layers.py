"""Transformer Engine's FP8 linear layers, as accelerate installs them, and its FP8 attention: rivals in `training.py linears`."""

import torch
import transformer_engine.pytorch as te
from accelerate.utils import convert_model
from torch import Tensor, nn
from transformer_engine.common.recipe import DelayedScaling, Format
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "transformer_engine"
RECIPES = {
    "linears": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16),
    "linears and attention": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, fp8_dpa=True),
}
"""E4M3 forward, E5M2 backward; the second runs attention in FP8 too (head dimension 128 on Hopper)."""

_cores: dict[nn.Module, te.DotProductAttention] = {}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_
) -> tuple[Tensor, None]:
    """Causal attention in the attention interface's form; one core a module, since it keeps amax histories."""
    if module not in _cores:
        heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[-1]
        _cores[module] = te.DotProductAttention(heads, dim, kv_heads, qkv_format="bshd", attn_mask_type="causal")
    batch, heads, length, dim = query.shape
    out = _cores[module](*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
    return out.view(batch, length, heads, dim), None


def use_linears(model: PreTrainedModel) -> None:
    with torch.no_grad():
        convert_model(model)


def use_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)


def autocast(attention_too: bool):
    """The context that a training step's forward runs in."""
    return te.fp8_autocast(enabled=True, fp8_recipe=RECIPES["linears and attention" if attention_too else "linears"])
