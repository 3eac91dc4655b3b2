"""Log-likelihoods of continuations under several models side by side, and the statistics of their differences.

lm-evaluation-harness scores one model at a time and keeps a continuation's log-likelihood alone; a KL divergence needs two models'
whole distributions at the same token, and 49,152 numbers a token are too many to keep. So all models see one batch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

Request = tuple[tuple[int, ...], tuple[int, ...]]
"""(context, continuation), token ids, neither empty."""


class Score(NamedTuple):
    """One continuation under one model; sums over its tokens, nats. `reference`: the first of the models."""

    log_likelihood: float
    greedy: bool  # every token is the model's first choice
    kl: float  # KL(reference ‖ model)
    agreed: int  # tokens at which the model's first choice is the reference's
    tokens: int


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of inputs, longest first, in batches of at most `batch_tokens` tokens with padding (but at least one input)."""
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= batch_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def log_probabilities(
    model: PreTrainedModel,
    ids: Tensor,  # (B, L)
    rows: Tensor,  # (n,)
    positions: Tensor,  # (n,)
) -> Tensor:
    """log p(next token) after position `positions[i]` of row `rows[i]`: (n, vocabulary), float32."""
    kept, indices = positions.unique(return_inverse=True)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return logits[rows, indices].float().log_softmax(-1)


def compare(
    reference: Tensor,  # (n, vocabulary), log-probabilities
    ours: Tensor,  # the same
    continuations: Sequence[Sequence[int]],
    starts: Sequence[int],  # row of each continuation's first token; continuations may share rows
) -> list[Score]:
    """Scores of continuations, from one transfer off the device."""
    counts = [len(x) for x in continuations]
    rows = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
    index, target = torch.tensor([rows, [token for x in continuations for token in x]], device=ours.device)
    choice = ours.argmax(-1)
    kl = (reference.exp() * (reference - ours)).sum(-1, dtype=torch.float64)
    per_token = (ours[index, target], choice[index] == target, kl[index], (choice == reference.argmax(-1))[index])
    first = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(torch.stack([x.double() for x in per_token]).cpu().numpy(), first, axis=1)
    return [
        Score(likelihood, greedy == count, total, int(agreed), count)
        for (likelihood, greedy, total, agreed), count in zip(sums.T.tolist(), counts, strict=True)
    ]


@torch.no_grad()
def score(
    models: dict[str, PreTrainedModel], requests: Sequence[Request], batch_tokens: int, max_length: int
) -> dict[str, list[Score]]:
    """Score every request under every model: log p(continuation | context), one forward a model and batch.

    Inputs are padded on the right, where causal attention does not look. Requests that differ in the last token alone (the
    letters of a choice) share a forward. Longer ones than `max_length` lose tokens on the left, as in lm-evaluation-harness.

    Args:
        models: the first is the reference of KL and agreement; all on one device, in eval mode.
        batch_tokens: largest batch, tokens with padding.
        max_length: largest input, tokens.
    Returns:
        for every model, Scores in the order of the requests.
    Raises:
        ValueError: a continuation that does not fit into `max_length`.
    """
    shared: dict[tuple, list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(f"a continuation must have 1 to {max_length} tokens, got {len(continuation)}")
        inputs = (context + continuation)[-max_length - 1 : -1]
        shared.setdefault((inputs, len(continuation)), []).append(index)
    groups = list(shared.items())
    result: dict[str, list[Score | None]] = {name: [None] * len(requests) for name in models}
    device = next(iter(models.values())).device
    for batch in batches([len(inputs) for (inputs, _), _ in groups], batch_tokens):
        ids = torch.zeros(len(batch), len(groups[batch[0]][0][0]), dtype=torch.long)  # the longest is first
        scored: list[tuple[int, int]] = []  # (row, position) of every token to predict
        chosen, starts = [], []  # requests of the batch, and where their tokens begin in `scored`
        for row, ((inputs, count), indices) in enumerate(groups[i] for i in batch):
            ids[row, : len(inputs)] = torch.tensor(inputs)
            chosen += indices
            starts += [len(scored)] * len(indices)
            scored += [(row, position) for position in range(len(inputs) - count, len(inputs))]
        rows, positions = torch.tensor(scored, device=device).unbind(1)
        reference = None
        for name, model in models.items():
            ours = log_probabilities(model, ids.to(device), rows, positions)
            reference = ours if reference is None else reference
            found = compare(reference, ours, [requests[i][1] for i in chosen], starts)
            for index, one in zip(chosen, found, strict=True):
                result[name][index] = one
    return result  # type: ignore[return-value]  # every group was in a batch


class Estimate(NamedTuple):
    value: float
    stderr: float


def estimate(totals: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Σ totals / Σ weights over items, with its standard error.

        r = Σ tᵢ / Σ wᵢ,    s.e. = √(n/(n−1) · Σ (tᵢ − r wᵢ)²) / Σ wᵢ

    With weights of 1 these are the mean and (sample standard deviation)/√n, lm-evaluation-harness's `mean_stderr`; else the
    usual linearised error of a ratio (Cochran, Sampling Techniques, §2.11). It assumes items drawn independently, with no
    correction for a finite set. NaN for a single item.
    """
    weights = weights or [1.0] * len(totals)
    n, weight = len(totals), math.fsum(weights)
    ratio = math.fsum(totals) / weight
    squares = math.fsum((t - ratio * w) ** 2 for t, w in zip(totals, weights, strict=True))
    return Estimate(ratio, math.sqrt(n / (n - 1) * squares) / weight if n > 1 else math.nan)


def evenly_spaced(size: int, limit: int | None) -> list[int]:
    """`limit` indices spread evenly over `size` items, the same every time; all of them without a limit."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]


@dataclass(frozen=True)
class Item:
    """One question: the harness's metrics, the choice each of them picks (empty where there is none), sums over scored tokens."""

    metrics: dict[str, float]
    picks: dict[str, int]
    log_likelihood: float
    kl: float
    agreed: int
    tokens: int


def agreement(metric: str, ours: Sequence[Item], reference: Sequence[Item], per_token: bool) -> float:
    """Share of items that pick the same choice; without choices, whose scored tokens all have the same first choice; of tokens."""
    if per_token:
        return sum(item.agreed for item in ours) / sum(item.tokens for item in ours)
    same = [
        a.picks[metric] == b.picks[metric] if a.picks else a.agreed == a.tokens
        for a, b in zip(ours, reference, strict=True)
    ]
    return sum(same) / len(same)


def summarise(task: str, available: int, items: dict[str, list[Item]]) -> list[dict]:
    """A row for every metric and mode of one task; the first mode is the reference of differences, agreement and KL.

    Accuracies are means over items. "perplexity" is exp(−log-likelihood / n), n the tokens of a passage in the task of that name
    and the one word in LAMBADA, as in the harness; its errors are those of the exponent, times the perplexity. The error of a
    difference is that of the items' differences, which is far smaller than the two errors together.
    """
    reference = next(iter(items.values()))
    per_token = task == "perplexity"
    rows = []
    for metric in reference[0].metrics:
        likelihood = metric == "perplexity"
        weights = [float(item.tokens) for item in reference] if per_token else None
        for mode, ours in items.items():
            totals, base = (
                [-item.log_likelihood if likelihood else item.metrics[metric] for item in x] for x in (ours, reference)
            )
            found, first = estimate(totals, weights), estimate(base, weights)
            gap = estimate([a - b for a, b in zip(totals, base, strict=True)], weights)
            if likelihood:
                found = Estimate(math.exp(found.value), math.exp(found.value) * found.stderr)
                level = math.exp(first.value)
                gap = Estimate(found.value - level, level * gap.stderr)
            kl = estimate([item.kl for item in ours], [float(item.tokens) for item in ours])
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "mode": mode,
                    "items": len(ours),
                    "available": available,
                    "value": found.value,
                    "stderr": found.stderr,
                    "difference": gap.value,
                    "difference_stderr": gap.stderr,
                    "agreement": agreement(metric, ours, reference, per_token),
                    "kl": kl.value,
                    "kl_stderr": kl.stderr,
                    "tokens": sum(item.tokens for item in ours),
                }
            )
    return rows
