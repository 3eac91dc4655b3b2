"""Where each family keeps the weights that make its logits, head by head, for `stability`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..stability.slices import UNCONTROLLED, HeadSlices, LogitWeights
from . import readers
from .decoders import FAMILIES
from .families import AttentionSite, attention_sites

_QK_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
"""Attributes under which attention modules keep norms of queries and keys."""

MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")
"""`config.model_type` of the models whose multi-head latent attention is read here."""

LatentRules = Literal["normalised", "published"]
"""Whether the rules for latent attention know of the norms on the latents."""


@dataclass(frozen=True)
class AttentionSlices:
    """Numbers of one attention layer's slices, by head. `rotary_query` is of latent attention only."""

    attention: nn.Module
    query: list[int]  # Hq; without RoPE in latent attention
    key: list[int]  # Hkv
    rotary_query: list[int]  # Hq, or empty


class _Builder:
    """Collects the slices of a model, layer by layer."""

    def __init__(self) -> None:
        self.found = LogitWeights([], [], [], [])
        self.layers: list[AttentionSlices] = []

    def slot(self, name: str) -> int:
        self.found.names.append(name)
        return len(self.found.names) - 1

    def heads(self, where: str, name: str, count: int) -> list[int]:
        return [self.slot(f"{where}, {name} of head {head}") for head in range(count)]

    def add(self, attention: Any, where: str, module: str, runs: Sequence[tuple[int, int]], dim: int = 0) -> None:
        """The weight of a projection, and its bias, from (label, rows) in the order in which the weight has them."""
        linear = getattr(attention, module)
        name = f"{where}: {module}"
        _refuse_projection(linear, name)
        labels = torch.repeat_interleave(*(torch.tensor(x) for x in zip(*runs, strict=True)))
        rows = linear.weight.shape[dim]
        if rows != len(labels):
            raise UnsupportedModelError(f"{name} must have {len(labels)} rows for its heads, it has {rows}")
        self.found.weights.append(HeadSlices(attention, f"{module}.weight", labels, dim, f"{name}.weight"))
        if linear.bias is not None:
            self.found.biases.append(HeadSlices(attention, f"{module}.bias", labels, 0, f"{name}.bias"))

    def couple(self, *slots: int, silent: Sequence[int] = ()) -> None:
        """Logits of these slices' product: each reaches them through all the others but the silent, whose size has no effect."""
        for slot in slots:
            self.found.products.append((slot, tuple(s for s in slots if s != slot and s not in silent)))


def _refuse_projection(linear: Any, name: str) -> None:
    if type(linear).__module__.startswith("peft."):
        raise UnsupportedModelError(
            f"{name} carries a PEFT adapter, whose own weights move the logits; logit control scales W_Q and W_K themselves. Train "
            "the base weights, merge the adapter (merge_and_unload), or leave queries and keys out of target_modules"
        )
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise UnsupportedModelError(
            f"{name} must have a floating-point weight with two dimensions, its {type(linear).__name__} has "
            f"{'none' if weight is None else f'{tuple(weight.shape)} {weight.dtype}'}: quantised weights cannot be controlled"
        )


def _refuse_qk_norm(attention: Any, where: str) -> None:
    for name in _QK_NORMS:
        if getattr(attention, name, None) is not None:
            raise UnsupportedModelError(
                f"{where} normalises queries and keys ({name}) after W_Q and W_K, whose size then has no effect on the logits: "
                "neither QuacK nor QK-Clip does anything there. Train it with a plain optimizer"
            )


def _grouped(builder: _Builder, site: AttentionSite, heads: int, kv_heads: int) -> AttentionSlices:
    """Slices of a layer whose logits are q·k, and their couplings; a shared key is coupled to every query of its group."""
    where = f"layer {site.layer}"
    slices = AttentionSlices(
        site.attention, builder.heads(where, "W_Q", heads), builder.heads(where, "W_K", kv_heads), []
    )
    for head, query in enumerate(slices.query):
        builder.couple(query, slices.key[head * kv_heads // heads])
    return slices


def _separate(builder: _Builder, site: AttentionSite, **_: Any) -> AttentionSlices:
    dim, attention = site.head_dim, site.attention
    for module in ("q_proj", "k_proj"):
        _refuse_projection(getattr(attention, module), site.describe(module))
    counts = [attention.q_proj.weight.shape[0] // dim, attention.k_proj.weight.shape[0] // dim]
    slices = _grouped(builder, site, *counts)
    for module, slots in (("q_proj", slices.query), ("k_proj", slices.key)):
        builder.add(attention, f"layer {site.layer}", module, [(slot, dim) for slot in slots])
    return slices


def _blocks(builder: _Builder, site: AttentionSite, name: str, dim: int = 0) -> AttentionSlices:
    """Rows q | k | v, columns if dim = 1."""
    _refuse_projection(getattr(site.attention, name), site.describe(name))
    heads, head_dim = site.attention.config.num_attention_heads, site.head_dim
    kv_heads = (getattr(site.attention, name).weight.shape[dim] // head_dim - heads) // 2
    slices = _grouped(builder, site, heads, kv_heads)
    runs = [(slot, head_dim) for slot in [*slices.query, *slices.key]]
    builder.add(site.attention, f"layer {site.layer}", name, [*runs, (UNCONTROLLED, kv_heads * head_dim)], dim)
    return slices


def _interleaved(builder: _Builder, site: AttentionSite, name: str, **_: Any) -> AttentionSlices:
    """Rows q, k and v of the first head, then of the second…"""
    heads, dim = site.attention.config.num_attention_heads, site.head_dim
    slices = _grouped(builder, site, heads, heads)
    runs = [
        (slot, dim) for query, key in zip(slices.query, slices.key, strict=True) for slot in (query, key, UNCONTROLLED)
    ]
    builder.add(site.attention, f"layer {site.layer}", name, runs)
    return slices


def _bigcode(builder: _Builder, site: AttentionSite) -> AttentionSlices:
    return (_blocks if site.attention.multi_query else _interleaved)(builder, site, name="c_attn")


def _conv1d(builder: _Builder, site: AttentionSite) -> AttentionSlices:
    return _blocks(builder, site, name="c_attn", dim=1)


_LAYOUTS: dict[Any, Any] = {
    readers.separate: _separate,
    readers.fused_blocks: _blocks,
    readers.fused_heads: _interleaved,
    readers.gpt_bigcode: _bigcode,
    readers.fused_conv1d: _conv1d,
}
"""Reader of `decoders.FAMILIES` → where the same weights have their heads."""


def _read_site(builder: _Builder, site: AttentionSite) -> AttentionSlices:
    _refuse_qk_norm(site.attention, f"layer {site.layer} of the {site.family} model")
    read: Any = FAMILIES[site.family].read
    layout = _LAYOUTS.get(getattr(read, "func", read))
    if layout is None:
        raise UnsupportedModelError(f"logit control does not know where {site.family} keeps the heads of W_Q and W_K")
    given = getattr(read, "keywords", {})
    return layout(builder, site, **({"name": given["name"]} if "name" in given else {}))


def _read_latent(builder: _Builder, attention: Any, layer: int, rules: LatentRules) -> AttentionSlices:
    """Multi-head latent attention: q = [W_uq c_q, R W_qr c_q], k = [W_uk c_kv, R W_kr x], one pair of latents c for all heads.

    "published": c_q = W_dq x, c_kv = W_dkv x, so that ‖W_dq‖ and ‖W_dkv‖ multiply what the other weights do. "normalised" (ours):
    c = γ ⊙ W x / rms(W x), as the models have it. That is the same for s·W, up to the norm's ε: ‖W_dq‖ and ‖W_dkv‖ drop out of the
    others' products. For W itself, c(sW + Δ) = c(W + Δ/s): a change of given size reaches the logits by 1/‖W‖, so its factor is
    (‖W‖/‖W‖₀)·(the product of the rest)₀/(that product).
    Without a query latent (`q_lora_rank` = None) W_uq and W_qr act on x, and the factor ‖W_dq‖ drops out (our reading).
    """
    where, heads = f"layer {layer}", attention.num_heads
    nope, rope, rank = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
    uq, uk = builder.heads(where, "W_UQ", heads), builder.heads(where, "W_UK", heads)
    qr = builder.heads(where, "W_QR", heads)
    dkv, kr = builder.slot(f"{where}, W_DKV"), builder.slot(f"{where}, W_KR")
    shared = []
    if attention.q_lora_rank is not None:
        shared = [builder.slot(f"{where}, W_DQ")]
        builder.add(attention, where, "q_a_proj", [(shared[0], attention.q_lora_rank)])
    knows = rules == "normalised"
    normalised = shared if knows and getattr(attention, "q_a_layernorm", None) is not None else []
    normalised = [*normalised, dkv] if knows and getattr(attention, "kv_a_layernorm", None) is not None else normalised
    for head in range(heads):
        builder.couple(uq[head], *shared, uk[head], dkv, silent=normalised)
        builder.couple(qr[head], *shared, kr, silent=normalised)
    builder.found.normalised += normalised
    queries = [(slot, rows) for pair in zip(uq, qr, strict=True) for slot, rows in zip(pair, (nope, rope), strict=True)]
    builder.add(attention, where, "q_b_proj" if shared else "q_proj", queries)
    builder.add(attention, where, "kv_a_proj_with_mqa", [(dkv, rank), (kr, rope)])
    keys = [run for slot in uk for run in ((slot, nope), (UNCONTROLLED, attention.v_head_dim))]
    builder.add(attention, where, "kv_b_proj", keys)
    return AttentionSlices(attention, uq, uk, qr)


def base_model(model: Any) -> Any:
    """The transformers model itself, or the one inside a PEFT model. Raises TypeError for anything else."""
    base = model.get_base_model() if type(model).__module__.startswith("peft.") else model
    if not hasattr(getattr(base, "config", None), "model_type"):
        raise TypeError(
            f"expected a transformers model or a PEFT model of one, got {type(model).__name__}; unwrap it first"
        )
    return base


def logit_weights(model: Any, latent_rules: LatentRules = "normalised") -> tuple[LogitWeights, list[AttentionSlices]]:
    """The slices of a model that make its logits, and by layer.

    Args:
        model: a decoder of a family in docs/families.md without q/k norm, or DeepSeek-V2 or -V3; a PEFT model of one that leaves
            queries and keys without adapters.
        latent_rules: "published", or "normalised" to account for the norms on the latents of DeepSeek's attention.
    Raises:
        ValueError: unknown rules.
        UnsupportedModelError: another family, a q/k norm, an adapter or quantised weights on queries or keys.
    """
    if latent_rules not in get_args(LatentRules):
        raise ValueError(f"latent_rules must be 'normalised' or 'published', got {latent_rules!r}")
    model = base_model(model)
    builder = _Builder()
    if model.config.model_type in MLA_FAMILIES:
        modules = [m for m in model.modules() if hasattr(m, "kv_a_proj_with_mqa") and hasattr(m, "kv_b_proj")]
        builder.layers = [
            _read_latent(builder, attention, layer, latent_rules) for layer, attention in enumerate(modules)
        ]
    else:
        builder.layers = [_read_site(builder, site) for site in attention_sites(model)]
    return builder.found, builder.layers
