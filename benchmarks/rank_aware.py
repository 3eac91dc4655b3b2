"""The rank-aware bound: its gains, and α_min against the logits of a real model.

    python benchmarks/rank_aware.py .model/SmolLM2-135M-Instruct --output docs/rank_aware

writes docs/rank_aware.md and docs/rank_aware.png. One CPU core, under four minutes; seeded. The model must be a Llama or
Mistral without biases. Everything about the theorem is our reconstruction from the abstract of arXiv 2602.18851;
tests/geometry/test_rank_aware.py simulates it.
"""

import argparse
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_geoscale.cli.loading import load, read_text, token_blocks
from hf_geoscale.geometry import (
    alpha_min,
    gram,
    interaction_sigma_upper,
    rank_aware_gain,
    sigma_upper,
    trace_power_bound,
    typicality_gamma,
)
from hf_geoscale.integrations.families import AttentionSite, attention_sites

MODEL = ".model/SmolLM2-135M-Instruct"
SEQUENCES, LENGTH = 4, 1024
FAILURE_PROB = 1e-6
OFFSETS_AT_ONCE = 128
OFFSET_SQUARINGS = 5
"""Trace power p = 32 for the norm at every RoPE offset: at most 6.7 % high at D = 64, for two thirds of the time."""


class Shape(NamedTuple):
    """What `alpha_min` asks of a model."""

    width: int
    rank: int
    length: int
    heads: int
    layers: int


MODELS = {
    "GPT-2 XL": Shape(1600, 64, 1024, 25, 48),
    "Mistral-7B": Shape(4096, 128, 4096, 32, 32),
    "Llama-2-13B": Shape(5120, 128, 4096, 40, 40),
    "Llama-2-70B": Shape(8192, 128, 4096, 64, 80),
}


def directions(*shape: int, generator: torch.Generator) -> Tensor:
    """Directions uniform on the sphere: `shape`, the last the width."""
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def gain_table() -> list[str]:
    """α_min, r/d, γ and d/(γr) of large models, Markdown."""
    lines = ["| model | d | D | heads × layers | L | α_min | r/d | γ | gain | γ, all of δ | gain, all of δ |"]
    lines.append("|" + "---|" * 11)
    for name, shape in MODELS.items():
        width, rank, length, heads, layers = shape
        alpha, gamma = alpha_min(*shape, failure_prob=FAILURE_PROB)
        whole = typicality_gamma(rank, length * heads * layers, FAILURE_PROB)
        gains = " | ".join(f"{g:.2f} | {rank_aware_gain(width, rank, g):.1f}" for g in (gamma, whole))
        size = f"{width} | {rank} | {heads} × {layers} | {length}"
        lines.append(f"| {name} | {size} | {alpha:.4f} | {rank / width:.4f} | {gains} |")
    return lines


@dataclass(frozen=True)
class Observed:
    """One layer on real tokens. α: largest |logit| / (σ·d·softmax_scale) over causal pairs and heads, σ an upper bound."""

    layer: int
    rope: float  # α, the model as it is, σ(M) as in the theorem
    still: float  # α, the same tokens with every position 0
    uniform: float  # α, uniform directions through the same weights, every position 0
    rope_offset: float  # α, RoPE, σ the largest over the offsets
    rope_product: float  # α, RoPE, σ(A_Q)·σ(A_K)
    diagonal: float  # α, a token with itself
    energy: float  # largest ‖Vᵀx‖²·d/r, V the row space of A_K
    cosine: float  # mean over pairs of different tokens of a sequence

    COLUMNS: ClassVar = (
        *("layer", "α, RoPE", "α, positions 0", "α, uniform directions", "α, RoPE, σ at its worst offset"),
        *("α, RoPE, σ(A_Q)·σ(A_K)", "α, token with itself", "largest energy", "mean cosine"),
    )


def largest_logits(
    q: Tensor,  # (B, Hq, L, D)
    k: Tensor,  # (B, Hkv, L, D)
) -> tuple[Tensor, Tensor]:
    """Largest |q·k| per head, over causal pairs and over pairs of a token with itself: (Hq,) float64 each."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    causal = torch.stack([(x @ y.mT).tril().abs().amax((1, 2)) for x, y in zip(q, k, strict=True)])
    return causal.amax(0).double(), (q * k).sum(-1).abs().amax((0, 2)).double()


def rotations(site: AttentionSite, length: int) -> Tensor:
    """R_Δ for Δ = 0 … L − 1, orthogonal (an attention factor is in the projections already): (L, D, D) float64."""
    dim = site.attention.head_dim
    basis = torch.eye(dim).view(1, dim, 1, dim).expand(-1, -1, length, -1)
    images, _ = apply_rotary_pos_emb(basis, basis, *site.rotary[0](basis, torch.arange(length)[None]))
    rotation = images[0].permute(1, 2, 0).double()
    return rotation / rotation[0, 0, 0]


def offset_sigma_upper(
    gram_q: Tensor,  # (Hq, D, D)
    gram_k: Tensor,  # (Hkv, D, D)
    rotation: Tensor,  # (L, D, D)
) -> Tensor:
    """Largest upper bound of σ(A_Qᵀ R_Δᵀ A_K) over the offsets Δ = query − key: (Hq,) float64."""
    grouped = gram_q.view(gram_k.shape[0], -1, *gram_q.shape[1:])
    largest = torch.zeros(grouped.shape[:2], dtype=torch.float64)
    for turn in rotation.split(OFFSETS_AT_ONCE):
        turned = turn.mT[:, None] @ gram_k @ turn[:, None]  # (offsets, Hkv, D, D)
        squared = trace_power_bound(grouped @ turned[:, :, None], OFFSET_SQUARINGS)
        largest = torch.maximum(largest, squared.amax(0))
    return largest.flatten().sqrt()


def observe(
    site: AttentionSite,
    tokens: Tensor,  # (B, L, d) before the input norm
    hidden: Tensor,  # (B, L, d) after it
) -> Observed:
    """What the tokens make of one layer."""
    attention, (batch, length, width) = site.attention, hidden.shape
    matrix_q, matrix_k = (projection.matrix() for projection in site.projections()[:2])
    q, k = (m(hidden).view(batch, length, -1, attention.head_dim) for m in (attention.q_proj, attention.k_proj))
    positions = torch.arange(length)[None]
    moving, still = (
        largest_logits(*apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *site.rotary[0](hidden, where)))
        for where in (positions, torch.zeros_like(positions))
    )
    random = directions(batch, 1, length, width, generator=torch.Generator().manual_seed(site.layer)) * width**0.5
    uniform, _ = largest_logits(*(random @ matrix.mT.to(random) for matrix in (matrix_q, matrix_k)))
    grams = gram(matrix_q), gram(matrix_k)
    sigma, at_offset = interaction_sigma_upper(*grams), offset_sigma_upper(*grams, rotations(site, length))
    product = sigma_upper(grams[0]) * sigma_upper(grams[1]).repeat_interleave(len(matrix_q) // len(matrix_k))
    bounds = (sigma, sigma, sigma, at_offset, product, sigma)
    logits = (moving[0], still[0], uniform, moving[0], moving[0], still[1])
    alphas = (float((logit / bound).amax()) / width for logit, bound in zip(logits, bounds, strict=True))
    unit = normalize(tokens, dim=-1)
    energy = (unit[:, None] @ torch.linalg.qr(matrix_k.mT).Q.to(unit)).square().sum(-1).amax()
    cosines = (unit.sum(1).square().sum(-1) - length) / (length * (length - 1))
    return Observed(site.layer, *alphas, float(energy) * width / attention.head_dim, float(cosines.mean()))


@torch.no_grad()
def observe_model(model: Any, ids: Tensor) -> list[Observed]:
    """Every layer of one forward of ids (B, L).

    Raises:
        ValueError: the theorem's M = A_Qᵀ A_K is not what this model multiplies tokens by.
    """
    sites, rows, hooks = list(attention_sites(model)), [], []
    for site in sites:
        query, key, _ = site.projections()
        if site.family not in ("llama", "mistral") or query.has_offset or key.has_offset:
            raise ValueError(
                f"expected a Llama or Mistral without biases, got a {site.family} model (layer {site.layer})"
            )
    try:
        for site in sites:
            hook = site.input_norm.register_forward_hook(
                lambda _, inputs, hidden, site=site: rows.append(observe(site, inputs[0], hidden))
            )
            hooks.append(hook)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def plot(rows: list[Observed], shape: Shape, path: Path, title: str) -> None:
    """α of every layer as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    columns, layers = list(zip(*map(astuple, rows), strict=True)), [row.layer for row in rows]
    for index, style in ((1, "o-"), (4, "^-"), (2, "s-"), (3, ".:")):
        axes.plot(layers, columns[index], style, markersize=4, label=Observed.COLUMNS[index])
    alpha, _ = alpha_min(*shape, failure_prob=FAILURE_PROB)
    axes.axhline(alpha, color="black", linestyle="--", label=f"α_min = {alpha:.3f}")
    axes.set(xlabel="layer", ylabel="α = max |logit| / (σ·d·softmax_scale)", title=title)
    axes.set_ylim(0, 1.4 * max(alpha, *columns[1]))  # room for the legend
    axes.legend(fontsize=8, loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


THEORY = f"""The body of arXiv 2602.18851 was not available to us: the theorem is our reconstruction from its abstract.

Tokens are √d·x, x independent and uniform on the sphere; M = U Σ Vᵀ has rank r; B₁ = σ(M)·d·softmax_scale. For one pair
P(|S| > α·B₁) ≤ 2·exp(−d²α²/(2γr)) + exp(−(r/2)(γ − 1 − ln γ)): but for the second term the key's energy ‖Vᵀx‖² is at most γr/d,
and then the query meets a fixed vector of norm ≤ σ·√(γr/d). α_min makes the sum over L²·Hq·layers logits and L·Hq·layers keys
δ, half of it each. `tests/geometry/test_rank_aware.py` simulates both statements.

A token with itself is not a pair of independent directions. Where W_Q = W_K with equal singular values its S/B₁ is ‖Uᵀx‖², r/d
on average, and the largest over a sequence can exceed α_min (it does in a test). Typicality bounds that diagonal by (γr/d)·B₁,
B₁ over the gain, so that max(α_min, γr/d) covers it (where W_Q ≠ W_K queries must be typical too, for another δ/2).

## Gain

δ = {FAILURE_PROB:g}. Gain: d/(γr), what the exponent gains on dα²/2, that of a bound which ignores the rank. The abstract publishes
8–28 ×. α_min spends half of δ on γ; the last two columns spend all of it there.
"""


def practice(rows: list[Observed], name: str, shape: Shape, image: str) -> list[str]:
    """The table of a real model and what it says of the premise, Markdown."""
    alpha, gamma = alpha_min(*shape, failure_prob=FAILURE_PROB)

    def above(field: str, limit: float = alpha) -> str:
        layers = [row.layer for row in rows if getattr(row, field) > limit]
        return f"{len(layers)} of {len(rows)} layers" + f" ({', '.join(map(str, layers))})" * bool(layers)

    def ratio(over: str, under: str) -> str:
        ratios = [getattr(row, over) / getattr(row, under) for row in rows]
        return f"{median(ratios):.1f} × (median; {min(ratios):.1f} to {max(ratios):.1f})"

    def span(field: str) -> str:
        values = [getattr(row, field) for row in rows]
        return f"{min(values):.2f} to {max(values):.2f}"

    return [
        "## Real tokens",
        "",
        f"{name}, {SEQUENCES} × {shape.length} tokens of English, causal pairs, float32.",
        "α = max |logit| / (σ·d·softmax_scale) over heads; σ is an upper bound, of M unless the column says otherwise.",
        f"α_min = {alpha:.3f}, γ = {gamma:.2f} (δ = {FAILURE_PROB:g} a sequence).",
        "Positions 0: the same hidden states, not rotated. Uniform directions: in place of the tokens, same weights, not rotated.",
        "",
        f"![α of every layer]({image})",
        "",
        f"- Above α_min with RoPE: {above('rope')}; at positions 0: {above('still')}; uniform directions: {above('uniform')}.",
        f"- RoPE lies outside the theorem. It changes α by {ratio('rope', 'still')}.",
        "  The logit goes through A_Qᵀ R_Δ A_K, whose norm can exceed σ(M). But R_Δ is as fixed as M and leaves the row space of",
        "  A_K, hence typicality, alone: with σ at its worst offset the theorem reads as before (simulated in the tests).",
        f"  Above α_min then: {above('rope_offset')}; with σ(A_Q)·σ(A_K), which bounds every offset: {above('rope_product')}.",
        f"- Tokens are not uniform. Mean cosine: {span('cosine')} (uniform: 0).",
        f"  Largest energy: {span('energy')} (uniform: 1 on average), above γ in {above('energy', gamma)}.",
        f"  Without rotation their α is that of uniform directions times {ratio('still', 'uniform')}.",
        f"- A token with itself reaches {span('diagonal')}; γr/d is {gamma * shape.rank / shape.width:.2f}.",
        "- So α_min promises nothing about real tokens: where it holds, the slack of its union bound makes up for the premise.",
        "  Report the α observed beside it. The certificate of the weights needs no premise.",
        "",
        f"| {' | '.join(Observed.COLUMNS)} |",
        "|" + "---|" * len(Observed.COLUMNS),
        *(f"| {row.layer} | {' | '.join(f'{value:.3f}' for value in astuple(row)[1:])} |" for row in rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODEL, help=f"folder or hub id; default: {MODEL}")
    parser.add_argument("--output", type=Path, help="path without suffix, for a .md and a .png; default: print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(arguments.model)
    config, name = model.config, Path(arguments.model).name
    rows = observe_model(model.eval(), token_blocks(tokenizer, read_text(None), LENGTH, SEQUENCES))
    heads, width = config.num_attention_heads, config.hidden_size
    shape = Shape(width, getattr(config, "head_dim", None) or width // heads, LENGTH, heads, config.num_hidden_layers)
    image = f"{(arguments.output or Path('rank_aware')).name}.png"
    made_by = f"Generated by `python benchmarks/rank_aware.py`, torch {torch.__version__}.\n{THEORY}"
    lines = ["# The rank-aware bound", "", made_by, *gain_table(), "", *practice(rows, name, shape, image)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(text)
        plot(rows, shape, arguments.output.with_suffix(".png"), f"{name}: observed α against α_min")


if __name__ == "__main__":
    main()
