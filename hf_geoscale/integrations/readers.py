"""Readers: from the way a family stores its weights to the three affine maps of `geometry.Projection`.

`rotary_factor` of a projection is any constant factor on its output, so OPT's scaled queries use it too.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..geometry import Projection
from .rotary import rotary_factor
from .weights import EffectiveWeight

if TYPE_CHECKING:
    from .families import AttentionSite

Projections = tuple[Projection, Projection, Projection]
Operand = tuple[Tensor, Tensor | None, Tensor | None]  # weight (H, D, d), bias (H, D), excess (H, D)


def _head_counts(site: "AttentionSite") -> tuple[int, int]:
    """Query and key/value heads."""
    attention, config = site.attention, site.attention.config
    heads = getattr(attention, "num_heads", None) or config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _token(site: "AttentionSite") -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift of what enters the projections; behind no norm layer, R/√d of the residual stream."""
    if site.stream is None:
        return site.norm(site.input_norm)
    bound = site.stream.norm_bound(site.describe("the attention"))
    width = site.stream.embedding.weight.shape[-1]
    return (bound / math.sqrt(width)).expand(width), None


def _width(site: "AttentionSite", name: str, token: tuple[Tensor | None, Tensor | None]) -> int:
    """Channels of a token: its gain's, or what a projection says it takes."""
    gain = token[0]
    return getattr(site.attention, name).in_features if gain is None else gain.numel()


def _operand(found: EffectiveWeight, heads: int, dim: int) -> Operand:
    bias, excess = (None if t is None else t.reshape(heads, dim) for t in (found.bias, found.excess))
    return found.weight.reshape(heads, dim, -1), bias, excess


def _operands(found: EffectiveWeight, parts: Callable[[Tensor], Sequence[Tensor]], counts: Sequence[int], dim: int):
    """Operands of one weight with rows of several projections, which `parts` takes apart."""
    weights = parts(found.weight)
    biases, excesses = ([None] * 3 if t is None else parts(t) for t in (found.bias, found.excess))
    pieces = zip(weights, biases, excesses, counts, strict=True)
    return [_operand(EffectiveWeight(w, b, e), count, dim) for w, b, e, count in pieces]


def _normalised(
    site: "AttentionSite", name: str, weight: Tensor, factor: float, scope: Literal["head", "projection"]
) -> Projection:
    """The map that ends a q/k norm; the projection before it does not matter.

    Over one head ‖u‖₂ ≤ √D. Over the whole projection (OLMo 2) a head's slice of u has at most the norm of all H·D channels,
    √(H·D) = √H·√D, so that the slice's own factor is √H·diag(γ of the slice); the factor goes with the rotary one.
    """
    norm, (heads, dim, _) = getattr(site.attention, name), weight.shape
    parts = [site.norm(part) for part in getattr(norm, "norms", [norm])]  # StableLM: one LayerNorm a head
    gains, shifts = [gain for gain, _ in parts], [shift for _, shift in parts if shift is not None]
    if gains[0] is None:
        gain = torch.ones(dim, dtype=torch.float64, device=weight.device)
    else:
        gain = torch.cat([g.detach().double().flatten() for g in gains if g is not None])
    if gain.numel() not in ((heads * dim,) if scope == "projection" else (dim, heads * dim)):
        raise UnsupportedModelError(
            f"{site.describe(name)} must normalise one {scope}, with a gain of {dim} or {heads} x {dim} channels; "
            f"it has {gain.numel()}"
        )
    gain = gain.view(-1, dim).expand(heads, dim)
    bias = (
        torch.cat([s.detach().double().flatten() for s in shifts]).view(-1, dim).expand(heads, dim) if shifts else None
    )
    if scope == "projection":
        if bias is not None:
            raise UnsupportedModelError(f"{site.describe(name)} has a shift, which a norm of a projection may not have")
        factor *= math.sqrt(heads)
    return Projection(torch.diag_embed(gain), bias=bias, rotary_factor=factor)


def _projections(
    site: "AttentionSite",
    operands: Sequence[Operand],
    token: tuple[Tensor | None, Tensor | None],
    qk_norms: tuple[str, str],
    scope: Literal["head", "projection"] = "head",
    rotated_first: bool = False,
    query_factor: float = 1.0,
) -> Projections:
    """Put norm, rotation and q/k norms around the three weights.

    Args:
        token: gain and shift of what enters them.
        qk_norms: attributes of the attention; used where they exist.
        rotated_first: the q/k norm follows the rotation, whose factor it cancels.
    """
    factor = rotary_factor(site.rotary)
    read = []
    if site.stream is not None:
        return _after_residual(site, operands, token, qk_norms, scope, factor)
    for (weight, bias, excess), name, times in zip(
        operands, (*qk_norms, ""), (query_factor * factor, factor, 1.0), strict=True
    ):
        if name and getattr(site.attention, name, None) is not None:
            times = 1.0 if rotated_first else times
            read.append(_normalised(site, name, weight, times, scope))
        else:
            read.append(Projection(weight, *token, bias, times, excess))
    return read[0], read[1], read[2]


def _after_residual(
    site: "AttentionSite",
    operands: Sequence[Operand],
    token: tuple[Tensor | None, Tensor | None],
    qk_norms: tuple[str, str],
    scope: Literal["head", "projection"],
    factor: float,
) -> Projections:
    """No norm layer precedes: q and k are bounded by their own norms, v by the residual stream, ‖h‖₂ ≤ R.

    v = W h + b with h = (R/√d)·u, ‖u‖₂ ≤ √d. R sums J + 1 maxima, so moving every weight by m moves R/√d by up to (J + 1)·m:
    the gain is R/(√d·(J + 1)) and the factor J + 1 (undone in b), which `weight_drift_budget` multiplies in.
    """
    stream: Any = site.stream
    (weight, bias, excess), terms = operands[2], len(stream.norms) + 1
    gain: Any = token[0]
    bias, excess = (None if t is None else t.double() / terms for t in (bias, excess))
    value = Projection(weight, gain.to(weight.device) / terms, None, bias, float(terms), excess)
    for name in qk_norms:
        if getattr(site.attention, name, None) is None:
            raise UnsupportedModelError(f"{site.describe(name)} is missing, so nothing bounds its operand")
    query, key = (
        _normalised(site, name, operand[0], factor, scope) for name, operand in zip(qk_norms, operands[:2], strict=True)
    )
    return query, key, value


def separate(
    site: "AttentionSite",
    qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
    scope: Literal["head", "projection"] = "head",
    rotated_first: bool = False,
    scaled_query: bool = False,
) -> Projections:
    """q_proj, k_proj and v_proj, as in Llama; `scaled_query` for OPT, whose queries are scaled before the attention."""
    dim, (heads, kv_heads) = site.head_dim, _head_counts(site)
    token, operands = _token(site), []
    width = _width(site, "q_proj", token)
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        operands.append(_operand(site.weight(name, (count * dim, width), token), count, dim))
    scale = float(site.attention.scaling) if scaled_query else 1.0
    return _projections(site, operands, token, qk_norms, scope, rotated_first, scale)


def fused_blocks(site: "AttentionSite", name: str) -> Projections:
    """One weight, rows q | k | v (Phi-3, DBRX, GPT-BigCode with one key head)."""
    dim, (heads, kv_heads) = site.head_dim, _head_counts(site)
    if getattr(site.attention, "multi_query", False):
        kv_heads = 1
    counts = (heads, kv_heads, kv_heads)
    token, rows = _token(site), [count * dim for count in counts]
    found = site.weight(name, (sum(rows), _width(site, name, token)), token)
    return _projections(site, _operands(found, lambda t: t.split(rows), counts, dim), token, ("q_norm", "k_norm"))


def fused_heads(
    site: "AttentionSite", name: str, qk_norms: tuple[str, str] = ("q_layernorm", "k_layernorm")
) -> Projections:
    """One weight, rows q, k and v of the first head, then of the second… (GPT-NeoX, Persimmon)."""
    heads, dim = site.attention.config.num_attention_heads, site.head_dim
    token = _token(site)
    found = site.weight(name, (3 * heads * dim, _width(site, name, token)), token)
    operands = _operands(found, lambda t: t.view(heads, 3, dim, *t.shape[1:]).unbind(1), [heads] * 3, dim)
    return _projections(site, operands, token, qk_norms)


def gpt_bigcode(site: "AttentionSite") -> Projections:
    """c_attn of GPT-BigCode: blocks with one key head, else head by head."""
    return fused_blocks(site, "c_attn") if site.attention.multi_query else fused_heads(site, "c_attn")


def fused_conv1d(site: "AttentionSite") -> Projections:
    """GPT-2: one Conv1D c_attn, weight (d, 3d) with columns q | k | v, bias, LayerNorm with shift, no RoPE."""
    attention, token = site.attention, _token(site)
    heads, dim, width = attention.num_heads, attention.head_dim, attention.embed_dim
    found = site.weight("c_attn", (width, 3 * width), token).transposed
    return _projections(site, _operands(found, lambda t: t.split(width), [heads] * 3, dim), token, ("", ""))
