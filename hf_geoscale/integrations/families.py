"""How each model family stores the weights that make q, k and v."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..geometry import Projection
from ..kernels import check_head_dim
from .sharding import parameter_versions


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer in its model. Modules are looked up at each use, so wrapping or replacing them later is seen."""

    family: str
    layer: int
    block: Any  # the decoder block that holds the norm and the attention
    rotary: Any

    @property
    def attention(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].attention)

    @property
    def input_norm(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].input_norm)

    @property
    def softmax_scale(self) -> float:
        return FAMILIES[self.family].softmax_scale(self.attention)

    def modules(self) -> list[nn.Module]:
        """The norm and the projections, whose parameters decide the scales."""
        return [self.input_norm, *(getattr(self.attention, name) for name in FAMILIES[self.family].modules)]

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

        (Fused optimizers do not count as writes for torch, hence the steps; see `parameter_versions` for what is invisible.)
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
        return (_optimizer_steps, *parameter_versions(site.modules()))


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
    known = isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or type(norm).__name__.endswith("RMSNorm")
    if not known or getattr(norm, "offset", None):
        raise UnsupportedModelError(
            f"{_describe(site, type(norm).__name__)} is not a LayerNorm or RMSNorm whose gain we know; "
            "tokens after it have no norm bound"
        )
    return norm.weight, getattr(norm, "bias", None)


def _rotary_factor(site: AttentionSite) -> float:
    return float(getattr(site.rotary, "attention_scaling", 1.0))


def _split_projections(site: AttentionSite) -> tuple[Projection, Projection, Projection]:
    """Llama, Mistral, Qwen2 (biases) and Qwen3 (norms per head after q and k): separate q_proj, k_proj, v_proj."""
    attention, config, rotary = site.attention, site.attention.config, _rotary_factor(site)
    gain, shift = _norm(site, site.input_norm)
    dim = attention.head_dim
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    read = {}
    for name, count in heads.items():
        weight, bias = _dense_weight(site, f"{name}_proj", (count * dim, config.hidden_size))
        factor = 1.0 if name == "v" else rotary
        bias = None if bias is None else bias.view(count, dim)
        read[name] = Projection(weight.view(count, dim, -1), gain, shift, bias, factor)
        head_norm = getattr(attention, f"{name}_norm", None)
        if head_norm is not None:
            head_gain, head_shift = _norm(site, head_norm)
            if head_gain is None or tuple(head_gain.shape) != (dim,) or head_shift is not None:
                raise UnsupportedModelError(
                    f"{_describe(site, name + '_norm')} must be an RMSNorm of one head, gain of shape ({dim},) and no shift"
                )
            read[name] = Projection.of_head_norm(head_gain, count, rotary)
    return read["q"], read["k"], read["v"]


def _fused_conv1d(site: AttentionSite) -> tuple[Projection, Projection, Projection]:
    """GPT-2: one Conv1D c_attn, weight (d, 3d) with columns q | k | v, bias, LayerNorm with shift, no RoPE."""
    attention = site.attention
    heads, dim, width = attention.num_heads, attention.head_dim, attention.embed_dim
    weight, bias = _dense_weight(site, "c_attn", (width, 3 * width))
    gain, shift = _norm(site, site.input_norm)
    biases = [None] * 3 if bias is None else bias.view(3, heads, dim)
    q, k, v = (
        Projection(w.T.reshape(heads, dim, width), gain, shift, b)
        for w, b in zip(weight.split(width, dim=1), biases, strict=True)
    )
    return q, k, v


def _gpt2_softmax_scale(attention: Any) -> float:
    """transformers 4.57 leaves `scaling` to the attention function (and sdpa there drops the per-layer factor)."""
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale


def _llama_like(attention_class: str, *extra_modules: str) -> Family:
    return Family(
        attention="self_attn",
        input_norm="input_layernorm",
        attention_class=attention_class,
        read=_split_projections,
        modules=("q_proj", "k_proj", "v_proj", *extra_modules),
        softmax_scale=lambda attention: attention.scaling,
    )


FAMILIES = {
    "llama": _llama_like("LlamaAttention"),
    "mistral": _llama_like("MistralAttention"),
    "qwen2": _llama_like("Qwen2Attention"),
    "qwen3": _llama_like("Qwen3Attention", "q_norm", "k_norm"),
    "gpt2": Family("attn", "ln_1", "GPT2Attention", _fused_conv1d, ("c_attn",), _gpt2_softmax_scale),
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
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
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
            check_head_dim(site.attention.head_dim)
        except ValueError as error:
            raise UnsupportedModelError(f"{_describe(site, family.attention)}: {error}") from error
        yield site
