"""Models of the whole-step benchmark: published shapes with random weights, and the attentions compared on them.

All contenders of a configuration share one set of parameters, gradients and optimizer states: deep copies of the modules alone.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_geoscale import patch_model
from hf_geoscale.integrations import geoscale_layers


@dataclass(frozen=True)
class ModelShape:
    """A decoder's published shape; its vocabulary is replaced by `vocabulary(length)`."""

    family: str  # "llama" or "mistral", as transformers and Liger name it
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    rope_theta: float


SHAPES = {
    "Llama-3-8B": ModelShape("llama", 4096, 14336, 32, 8, 32, 500000.0),
    "Llama-3.2-1B": ModelShape("llama", 2048, 8192, 32, 8, 16, 500000.0),
    "Mistral-7B": ModelShape("mistral", 4096, 14336, 32, 8, 32, 1000000.0),
    "smoke": ModelShape("llama", 128, 192, 2, 1, 2, 10000.0),
}

LONG, VOCABULARY, SHORT_VOCABULARY = 8192, 32768, 1024


def vocabulary(length: int) -> int:
    """Up to LONG tokens 32,768; above it 1,024, so that float32 logits (4 GB at 32k) leave room for layers."""
    return VOCABULARY if length <= LONG else SHORT_VOCABULARY


def build(name: str, layers: int, length: int, window: int | None, device: str) -> PreTrainedModel:
    """A model of a shape with random BF16 weights (seed 0), in training mode."""
    shape = SHAPES[name]
    options: dict[str, Any] = {
        "vocab_size": vocabulary(length) if name != "smoke" else 128,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": max(length, 2048),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "use_cache": False,
    }
    config = LlamaConfig(**options) if shape.family == "llama" else MistralConfig(**options, sliding_window=window)
    kind = LlamaForCausalLM if shape.family == "llama" else MistralForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, dtype=torch.bfloat16).train()


def _register(name: str, backend: SDPBackend) -> str:
    """SDPA restricted to one backend, under a name of its own: compiled layers keep the backend they were traced with."""

    def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
        with sdpa_kernel(backend):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


CUDNN = _register("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)
FLASH = _register("sdpa_fa2", SDPBackend.FLASH_ATTENTION)  # transformers treats names with "flash" in them otherwise


@dataclass
class Contender:
    """One way to run the shared parameters."""

    name: str
    model: PreTrainedModel
    ours: bool  # its scales are refreshed after every optimizer step
    replaced: dict[str, Any] = field(default_factory=dict)  # functions of the modelling file while it runs

    @contextmanager
    def running(self) -> Iterator[None]:
        """The modelling file's functions as this contender needs them."""
        module = sys.modules[type(self.model).__module__]
        before = {name: getattr(module, name) for name in self.replaced}
        vars(module).update(self.replaced)
        try:
            yield
        finally:
            vars(module).update(before)


def apply_liger(model: PreTrainedModel) -> dict[str, Any]:
    """Liger's RoPE, RMSNorm and SwiGLU through its own API; its loss stays out, so that all contenders have one head.

    Returns:
        What it replaced in the modelling file, which is as before again: Liger patches it for every model of the process.
    """
    from liger_kernel import transformers as liger

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    apply: Callable[..., None] = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
    try:
        apply(model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
        return {name: x for name, x in vars(module).items() if before.get(name) is not x}
    finally:
        vars(module).update(before)


ATTENTIONS = {"SDPA": "sdpa", "SDPA cuDNN": CUDNN, "SDPA flash": FLASH, "Liger + SDPA cuDNN": CUDNN}
"""Names in transformers; "SDPA" lets torch choose the backend."""

SDPA = ("SDPA cuDNN", "SDPA flash", "SDPA")
UNFUSED = "hf_geoscale, no fused front end"
CONTENDERS = (*SDPA, "Liger + SDPA cuDNN", "hf_geoscale", UNFUSED, "Liger + hf_geoscale")


def contend(name: str, base: PreTrainedModel, checkpointing: bool, **overrides) -> Contender:
    """A contender on the base model's parameters.

    Args:
        overrides: fields of GeoScaleConfig.
    Raises:
        ImportError: Liger is not installed, or does not load.
    """
    shared: dict[int, Any] = {id(x): x for x in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    if checkpointing:
        with warnings.catch_warnings():  # transformers 5.23 deprecates the name, 5.17 has no other
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    replaced = apply_liger(model) if name.startswith("Liger") else {}
    ours = "hf_geoscale" in name
    if ours:
        patch_model(model, **({"fused_front_end": False} if name == UNFUSED else {}), **overrides)
    else:
        model.set_attn_implementation(ATTENTIONS[name])
    return Contender(name, model, ours, replaced)


def counters(contender: Contender) -> dict[str, int]:
    """Of all layers and steps: calls in FP8, those with the fused front end, calls on SDPA, overflows."""
    layers = geoscale_layers(contender.model)
    return {
        "calls": sum(layer.calls for layer in layers),
        "front_end_calls": sum(layer.front_end_calls for layer in layers),
        "fallback_calls": sum(layer.delegated.total() for layer in layers),
        "overflows": sum(layer.statistics.overflows for layer in layers),
    }


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile on every decoder layer, with inductor.

    The backend is a function of its own: compiled code is cached by the layer's source and the backend, and contenders share the
    source.
    """
    from torch._inductor.compile_fx import compile_fx

    def inductor(graph, inputs):
        return compile_fx(graph, inputs)

    torch._dynamo.config.recompile_limit = 64  # per source line, over all contenders
    for layer in model.model.layers:
        layer.compile(backend=inductor, dynamic=False)
