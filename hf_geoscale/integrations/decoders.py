"""The table of decoder families: where each keeps its attention, and which reader understands its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import readers

if TYPE_CHECKING:
    from .families import AttentionSite


@dataclass(frozen=True)
class Family:
    """One `config.model_type`."""

    attention: str  # attribute of the block
    input_norm: str
    attention_class: str
    read: Callable[["AttentionSite"], readers.Projections]
    modules: tuple[str, ...]  # of the attention, whose parameters decide the scales
    softmax_scale: Callable[[Any], float]
    # The norms that end a block's sublayers, where none begins them; one is `input_norm`.
    post_norms: tuple[str, ...] = ()


def _gpt2_softmax_scale(attention: Any) -> float:
    """transformers 4.57 leaves `scaling` to the attention function (and sdpa there drops the per-layer factor)."""
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale


def _llama_like(
    attention_class: str,
    *extra_modules: str,
    input_norm: str = "input_layernorm",
    post_norms: tuple[str, ...] = (),
    **layout,
) -> Family:
    """self_attn with q_proj, k_proj and v_proj; `layout` is passed to `readers.separate`."""
    return Family(
        attention="self_attn",
        input_norm=input_norm,
        attention_class=attention_class,
        read=partial(readers.separate, **layout),
        modules=("q_proj", "k_proj", "v_proj", *extra_modules),
        softmax_scale=(lambda _: 1.0) if layout.get("scaled_query") else (lambda attention: attention.scaling),
        post_norms=post_norms,
    )


def _post_norm(attention_class: str, **layout) -> Family:
    """OLMo 2 and its kin: norms only after attention and MLP, and on q and k."""
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    return _llama_like(attention_class, *_QK_NORMS, input_norm=norms[0], post_norms=norms, **layout)


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
    "apertus1p5_text": _llama_like("Apertus1p5TextAttention", *_QK_NORMS, input_norm="attention_layernorm"),
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
    "exaone": _llama_like("LlamaAttention"),
    "exaone4": _post_norm("Exaone4Attention"),
    "exaone_moe": _llama_like("ExaoneMoeAttention", *_QK_NORMS),
    "flex_olmo": _post_norm("FlexOlmoAttention", scope="projection"),
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
    "internlm3": _llama_like("LlamaAttention"),
    "iquestcoder": _llama_like("LlamaAttention"),
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
    "olmo2": _post_norm("Olmo2Attention", scope="projection"),
    "olmo3": _post_norm("Olmo3Attention", scope="projection"),
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
    "sarvam_moe": _llama_like("Glm4MoeAttention", *_QK_NORMS),
    "seed_oss": _llama_like("SeedOssAttention"),
    "smollm3": _llama_like("SmolLM3Attention"),
    "solar_open": _llama_like("SolarOpenAttention"),
    "stablelm": _llama_like("StableLmAttention", *_QK_LAYERNORMS, qk_norms=_QK_LAYERNORMS),
    "starcoder2": _llama_like("Starcoder2Attention"),
    "vaultgemma": _llama_like("VaultGemmaAttention"),
}
