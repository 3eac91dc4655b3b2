"""Span scaling inside a patched model: which tokens make a sequence, read off what they may see."""

import torch
from torch import Tensor

from ..errors import UnsupportedAttentionError
from ..kernels import Visibility
from ..stability.span import Sequences, scale_span_gradients
from .layer import GeoScaleLayer


def sequences_of(
    visibility: Visibility,
    batch: int,
    device: torch.device,
) -> tuple[Sequences | None, Sequences | None]:
    """Sequences of the queries and of the keys; None where each row of the batch is one.

    A position that does not see itself is padding. A sequence starts where a token sees nothing before itself, or after padding:
    packed documents, and the chunks of chunked attention, are sequences of their own; a sliding window of two or more is not. Keys
    of a past belong to the sequence whose first token sees them. Waits for the device where a mask was given.
    """
    if visibility.key_range is None:
        return None, None
    past = visibility.key_length - visibility.query_length
    bounds = visibility.rows(0, visibility.query_length, device)
    first, stop = bounds.expand(batch, -1, -1).unbind(-1)
    position = torch.arange(visibility.query_length, device=device) + past
    token = (first <= position) & (position < stop)
    outside = torch.zeros_like(token[:, :1])
    before, after = torch.cat([outside, token[:, :-1]], 1), torch.cat([token[:, 1:], outside], 1)
    begins = token & ((first == position) | ~before)
    ends = token & (torch.cat([begins[:, 1:], outside], 1) | ~after)
    rows, starts = begins.nonzero(as_tuple=True)
    found = torch.stack([rows, starts, ends.nonzero(as_tuple=True)[1] + 1, first[rows, starts]], -1).tolist()
    if len(found) == batch and all(s[1:] == [0, visibility.query_length, 0] for s in found):
        return None, None
    queries = tuple((row, start, end) for row, start, end, _ in found)
    return queries, tuple((row, seen, end + past) for row, _, end, seen in found)


def scales_spans(layer: GeoScaleLayer, *operands: Tensor) -> bool:
    """Whether gradients that will pass through these operands are to be scaled."""
    scaling = layer.config.span_scaling
    return scaling is not None and not scaling.is_identity and any(x.requires_grad for x in operands)


def refuse_unknown_sequences(layer: GeoScaleLayer, what: str) -> None:
    """Raise UnsupportedAttentionError: gradients through a call whose sequences cannot be told."""
    raise UnsupportedAttentionError(
        f"span scaling cannot tell the sequences of {what} ({layer.name}), and the call needs gradients. Run it under "
        "torch.no_grad(), change the mask, or patch with span_scaling=None"
    )


def with_scaled_spans(
    layer: GeoScaleLayer,
    visibility: Visibility,
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk or more, D)
    value: Tensor,  # (B, Hkv, Lk or more, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """The call's operands, whose gradients will be scaled as the layer's config says."""
    scaling = layer.config.span_scaling
    if scaling is None:
        return query, key, value
    batch = query.shape[0]
    queries, keys = sequences_of(visibility, batch, query.device)
    if keys is None and visibility.key_length != key.shape[2]:  # beyond lies what a static cache has not filled
        keys = tuple((row, 0, visibility.key_length) for row in range(batch))
    return scale_span_gradients(query, key, value, scaling, query_sequences=queries, key_sequences=keys)
