"""How each model family stores the weights that make q, k and v."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..geometry import Projection
from ..kernels import check_head_dim
from . import readers
from .norms import gain_and_shift


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer in its model. Modules are looked up at each use, so wrapping or replacing them later is seen."""

    family: str
    layer: int
    block: Any  # the decoder block that holds the norm and the attention
    rotary: tuple[Any, ...]  # the model's rotary embeddings

    @property
    def attention(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].attention)

    @property
    def input_norm(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].input_norm)

    @property
    def head_dim(self) -> int:
        attention = self.attention
        return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size

    def describe(self, name: str) -> str:
        return _describe(self, name)

    def dense_weight(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Effective weight and bias of a projection of the attention. Raises UnsupportedModelError."""
        return _dense_weight(self, name, shape)

    def norm(self, norm: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift of a norm layer, (d,) each or None. Raises UnsupportedModelError."""
        return _norm(self, norm)

    @property
    def softmax_scale(self) -> float:
        return FAMILIES[self.family].softmax_scale(self.attention)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """The affine maps from the normalised token to q, k and v, with today's weights.

        Raises:
            UnsupportedModelError: a module that hides its effective weight (LoRA, quantised, sharded, unknown norm).
        """
        return FAMILIES[self.family].read(self)

    def parameters(self) -> list[Tensor]:
        """The tensors that the projections are read from."""
        projections = self.projections()
        tensors = (t for p in projections for t in (p.weight, p.bias, p.norm_gain, p.norm_shift) if t is not None)
        return list({(t.data_ptr(), t.shape): t for t in tensors}.values())

    def version(self) -> tuple:
        """Changes whenever a weight is replaced or written in place, and with every step of any torch optimizer.

        (Fused optimizers do not count as writes for torch, hence the steps; writes through `.data` are invisible to both.)
        """
        return FAMILIES[self.family].version(self)


@dataclass(frozen=True)
class Family:
    """One `config.model_type`."""

    attention: str  # attribute of the block
    input_norm: str
    attention_class: str
    read: Callable[[AttentionSite], tuple[Projection, Projection, Projection]]
    modules: tuple[str, ...]  # of the attention, whose parameters decide the scales
    softmax_scale: Callable[[Any], float]

    def version(self, site: AttentionSite) -> tuple:
        modules = [site.input_norm, *(getattr(site.attention, name, None) for name in self.modules)]
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        # An inference tensor counts no changes: a new object differs from every earlier version.
        writes = [(p.data_ptr(), object() if p.is_inference() else p._version) for p in parameters]
        return (_optimizer_steps, *writes)


_optimizer_steps = 0  # of any optimizer in this process


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def _describe(site: AttentionSite, name: str) -> str:
    return f"layer {site.layer} of the {site.family} model: {name}"


def _dense_weight(site: AttentionSite, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection, once it is sure that they are the effective ones."""
    module: Any = getattr(site.attention, name)
    where = _describe(site, name)
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__} adapter, whose effective weight this release does not certify; "
            "merge it first (model.merge_and_unload()) or unpatch the model"
        )
    if type(module) not in (nn.Linear, Conv1D):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__}; only nn.Linear and Conv1D are sure to compute what their weight says"
        )
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{where} holds {weight.dtype} weights; load the model in bfloat16, float16 or float32"
        )
    if hasattr(weight, "full_tensor") or weight.is_meta:
        raise UnsupportedModelError(
            f"{where} is sharded or on the meta device; patch the model where its weights are whole"
        )
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnsupportedModelError(
            f"{where} keeps its weight as a {type(weight).__name__}, whose values we cannot read"
        )
    if tuple(weight.shape) != shape:
        raise UnsupportedModelError(f"{where} must have a weight of shape {shape}, got {tuple(weight.shape)}")
    return weight, getattr(module, "bias", None)


def _norm(site: AttentionSite, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift of a norm layer whose output is bounded: (d,) each, or None where it has none."""
    return gain_and_shift(norm, _describe(site, type(norm).__name__))


def _gpt2_softmax_scale(attention: Any) -> float:
    """transformers 4.57 leaves `scaling` to the attention function (and sdpa there drops the per-layer factor)."""
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale


def _llama_like(attention_class: str, *extra_modules: str, input_norm: str = "input_layernorm", **layout) -> Family:
    """self_attn with q_proj, k_proj and v_proj; `layout` is passed to `readers.separate`."""
    return Family(
        attention="self_attn",
        input_norm=input_norm,
        attention_class=attention_class,
        read=partial(readers.separate, **layout),
        modules=("q_proj", "k_proj", "v_proj", *extra_modules),
        softmax_scale=lambda attention: attention.scaling,
    )


def _fused(attention: str, input_norm: str, attention_class: str, read: Callable[..., Any], *modules: str) -> Family:
    return Family(attention, input_norm, attention_class, read, modules, lambda attention: attention.scaling)


_QK_NORMS = ("q_norm", "k_norm")
_QK_LAYERNORMS = ("q_layernorm", "k_layernorm")
_QUERY_KEY_VALUE = partial(readers.fused_heads, name="query_key_value")
_QKV_PROJ, _WQKV = (partial(readers.fused_blocks, name=name) for name in ("qkv_proj", "Wqkv"))
_ROTATED_FIRST = ("query_layernorm", "key_layernorm")

FAMILIES = {
    "afmoe": _llama_like("AfmoeAttention", *_QK_NORMS),
    "apertus": _llama_like("ApertusAttention", *_QK_NORMS, input_norm="attention_layernorm"),
    "arcee": _llama_like("ArceeAttention"),
    "aria_text": _llama_like("AriaTextAttention"),
    "biogpt": _llama_like("BioGptAttention", input_norm="self_attn_layer_norm"),
    "cohere": _llama_like("CohereAttention", *_QK_NORMS),
    "cohere2": _llama_like("Cohere2Attention"),
    "cohere2_moe": _llama_like("Cohere2MoeAttention"),
    "cwm": _llama_like("CwmAttention"),
    "dbrx": _fused("attn", "norm_1", "DbrxAttention", _WQKV, "Wqkv"),
    "dots1": _llama_like("Dots1Attention", *_QK_NORMS),
    "emu3": _llama_like("Emu3Attention"),
    "emu3_text_model": _llama_like("Emu3Attention"),
    "ernie4_5": _llama_like("Ernie4_5Attention"),
    "ernie4_5_moe": _llama_like("Ernie4_5_MoeAttention"),
    "exaone_moe": _llama_like("ExaoneMoeAttention", *_QK_NORMS),
    "gemma": _llama_like("GemmaAttention"),
    "gemma2": _llama_like("Gemma2Attention"),
    "gemma3_text": _llama_like("Gemma3Attention", *_QK_NORMS),
    "glm": _llama_like("GlmAttention"),
    "glm4": _llama_like("Glm4Attention"),
    "glm4_moe": _llama_like("Glm4MoeAttention", *_QK_NORMS),
    "gpt2": Family("attn", "ln_1", "GPT2Attention", readers.fused_conv1d, ("c_attn",), _gpt2_softmax_scale),
    "gpt_bigcode": _fused("attn", "ln_1", "GPTBigCodeAttention", readers.gpt_bigcode, "c_attn"),
    "gpt_neox": _fused("attention", "input_layernorm", "GPTNeoXAttention", _QUERY_KEY_VALUE, "query_key_value"),
    "granite": _llama_like("GraniteAttention"),
    "granitemoe": _llama_like("GraniteMoeAttention"),
    "granitemoeshared": _llama_like("GraniteMoeSharedAttention"),
    "helium": _llama_like("HeliumAttention"),
    "hrm_text": _llama_like("HrmTextAttention"),
    "hunyuan_v1_dense": _llama_like(
        "HunYuanDenseV1Attention", *_ROTATED_FIRST, qk_norms=_ROTATED_FIRST, rotated_first=True
    ),
    "hunyuan_v1_moe": _llama_like(
        "HunYuanMoEV1Attention", *_ROTATED_FIRST, qk_norms=_ROTATED_FIRST, rotated_first=True
    ),
    "hy_v3": _llama_like("HYV3Attention", *_QK_NORMS),
    "hyperclovax": _llama_like("HyperCLOVAXAttention"),
    "jais2": _llama_like("Jais2Attention"),
    "kolibri1": _llama_like("Kolibri1Attention", *_QK_NORMS),
    "laguna": _llama_like("LagunaAttention", *_QK_NORMS),
    "llama": _llama_like("LlamaAttention"),
    "mellum": _llama_like("MellumAttention", *_QK_NORMS),
    "minimax_m2": _llama_like("MiniMaxM2Attention", *_QK_NORMS, scope="projection"),
    "ministral": _llama_like("MinistralAttention"),
    "mistral": _llama_like("MistralAttention"),
    "mixtral": _llama_like("MixtralAttention"),
    "nanochat": _llama_like("NanoChatAttention", *_QK_NORMS, rotated_first=True),
    "nemotron": _llama_like("NemotronAttention"),
    "olmo": _llama_like("OlmoAttention"),
    "olmoe": _llama_like("OlmoeAttention", *_QK_NORMS, scope="projection"),
    "opt": _llama_like("OPTAttention", input_norm="self_attn_layer_norm", scaled_query=True),
    "persimmon": _fused(
        "self_attn", "input_layernorm", "PersimmonAttention", _QUERY_KEY_VALUE, "query_key_value", *_QK_LAYERNORMS
    ),
    "phi": _llama_like("PhiAttention", *_QK_LAYERNORMS, qk_norms=_QK_LAYERNORMS),
    "phi3": _fused("self_attn", "input_layernorm", "Phi3Attention", _QKV_PROJ, "qkv_proj"),
    "phimoe": _llama_like("PhimoeAttention"),
    "qwen2": _llama_like("Qwen2Attention"),
    "qwen2_moe": _llama_like("Qwen2MoeAttention"),
    "qwen3": _llama_like("Qwen3Attention", *_QK_NORMS),
    "qwen3_moe": _llama_like("Qwen3MoeAttention", *_QK_NORMS),
    "seed_oss": _llama_like("SeedOssAttention"),
    "smollm3": _llama_like("SmolLM3Attention"),
    "solar_open": _llama_like("SolarOpenAttention"),
    "stablelm": _llama_like("StableLmAttention", *_QK_LAYERNORMS, qk_norms=_QK_LAYERNORMS),
    "starcoder2": _llama_like("Starcoder2Attention"),
    "vaultgemma": _llama_like("VaultGemmaAttention"),
}


def attention_sites(model: Any) -> Iterator[AttentionSite]:
    """Every attention layer of a supported model, in order.

    Raises:
        UnsupportedModelError: a family we do not know, cross-attention, an unknown attention class, or a head dimension
            FP8 attention does not have.
    """
    model_type = model.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported, its attention geometry is unknown; supported: "
            f"{', '.join(sorted(FAMILIES))}. Pass fallback='sdpa' to leave its attention to SDPA, counted"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise UnsupportedModelError(
            "cross-attention (config.add_cross_attention=True) is not supported: keys come from elsewhere"
        )
    rotary = tuple(m for name, m in model.named_modules() if name.rpartition(".")[2].startswith("rotary_emb"))
    blocks = [m for m in model.modules() if hasattr(m, family.attention) and hasattr(m, family.input_norm)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder block with {family.attention} and {family.input_norm}"
        )
    for index, block in enumerate(blocks):
        site = AttentionSite(model_type, index, block, rotary)
        classes = [c.__name__ for c in type(site.attention).__mro__]
        if family.attention_class not in classes:
            raise UnsupportedModelError(
                f"{_describe(site, family.attention)} must be a {family.attention_class}, got {classes[0]}: "
                "custom attention code may not call the attention interface"
            )
        try:
            check_head_dim(site.head_dim)
        except ValueError as error:
            raise UnsupportedModelError(f"{_describe(site, family.attention)}: {error}") from error
        yield site
