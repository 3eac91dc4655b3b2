"""The mask side of the attention interface: turn what transformers asks for into per-row key ranges."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..kernels import Visibility, key_range_of_block
from .packing import (
    documents_of_lengths,
    intersection,
    say_that_positions_are_documents,
    say_that_positions_are_no_documents,
    version_of,
)

MASK_ROWS = 256
"""Rows of a mask evaluated at a time, so that no L×L mask is ever stored."""

CONTINUATION_ROWS = 64
"""Query rows from which a call with a past runs in FP8: one row block of the kernels. Fewer rows are decoding, or the check of
drafts, which must choose the tokens that decoding would."""

HIDDEN = -1e8
"""An additive mask entry this low hides its key: beside a visible one it would take a logit of 5·10⁷ to give it any weight."""

_ranges = WeakTensorKeyDictionary()  # explicit 4D mask → (version, key ranges or None): one analysis for all layers
_reaches = WeakTensorKeyDictionary()  # mask → (version, reach of its key ranges)


def _ranges_by_rows(rows_of, query_length: int) -> Tensor | None:
    """Key ranges (B, Lq, 2) int32 of a mask given as rows_of(start, stop) → (B, rows, Lk) bool; None if a row has holes."""
    pieces, contiguous = [], []
    for start in range(0, query_length, MASK_ROWS):
        ranges, whole = key_range_of_block(rows_of(start, min(start + MASK_ROWS, query_length)))
        pieces.append(ranges.to(torch.int32))
        contiguous.append(whole)
    return torch.cat(pieces, dim=1) if bool(torch.stack(contiguous).all()) else None


def key_range_of_mask(
    mask: Tensor,  # (B, 1 or H, Lq or 1, Lk), bool (True = visible) or additive (0 = visible, ≤ HIDDEN or -inf = hidden)
) -> Tensor | None:
    """Key ranges (B, Lq or 1, 2) of an explicit mask, or None when it is no mask of contiguous ranges (holes, biases, heads
    that differ)."""
    version, known = version_of(mask), _ranges.get(mask)
    if known is None or version is None or known[0] != version:
        known = version, _analyse(mask)
        _ranges[mask] = known
    return known[1]


def _analyse(mask: Tensor) -> Tensor | None:
    first = mask[:, :1]
    if mask.shape[1] != 1 and mask.stride(1) != 0 and not bool((mask == first).all()):
        return None
    visible = first[:, 0]
    if mask.is_floating_point():
        hidden = visible <= max(torch.finfo(mask.dtype).min / 2, HIDDEN)
        if bool((visible.masked_fill(hidden, 0) != 0).any()):
            return None
        visible = ~hidden
    elif mask.dtype != torch.bool:
        return None
    return _ranges_by_rows(lambda start, stop: visible[:, start:stop], mask.shape[2])


def is_key_range(
    mask: Tensor,  # 4D
    key_length: int,
) -> bool:
    """Whether a mask holds the key ranges of `geoscale_mask`, (B, 1, Lq, 2) int32; it makes none where two keys could be meant."""
    return mask.dtype == torch.int32 and mask.shape[-1] == 2 != key_length


def reach_of_mask(mask: Tensor, key_range: Tensor) -> int:
    """One past the last key that any row sees: how much of a static cache is filled and in view."""
    version, known = version_of(mask), _reaches.get(mask)
    if known is None or version is None or known[0] != version:
        known = version, int(key_range[..., 1].amax())
        _reaches[mask] = known
    return known[1]


def visibility_of_call(
    mask: Tensor | None,  # (B or 1, 1 or H, Lq or 1, Lk or more), or key ranges (B, 1, Lq, 2)
    batch: int,
    query_length: int,
    key_length: int,
    causal: bool,
    window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Visibility | None:
    """What an attention call may see, or None when ranges cannot express it. Keys beyond its `key_length` are not to be read.

    A mask replaces the layer's own causal and window flags, as in SDPA. Documents come from `cu_seq_lens_q`, whatever the mask.
    Those that transformers reads off `position_ids` are in the mask of `geoscale_mask`: here positions cut nothing. transformers
    leaves the mask of longer keys out for the prompt of a static cache alone. Columns of a mask beyond the keys are cut off, as
    SDPA's and the eager attention cut them: Persimmon and Granite MoE of transformers 4 pass one too many.

    Raises:
        ValueError: cumulative lengths that are not of this batch or contradict the positions; see `documents_of_lengths`.
    """
    documents = None
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != query_length):
        position_ids = None  # several axes of a picture, or positions of more than these rows
    if cu_seq_lens_q is not None:
        documents = documents_of_lengths(cu_seq_lens_q, cu_seq_lens_k, position_ids, batch, query_length)
    if mask is None:
        if causal and key_length > query_length:
            key_length = query_length
        if documents is None and position_ids is not None and key_length == query_length:
            say_that_positions_are_no_documents(position_ids)
        key_range = None if documents is None else documents.expand(batch, -1, -1)
        return Visibility(query_length, key_length, causal, window if causal else None, key_range)
    if is_key_range(mask, key_length):
        key_range = mask[:, 0]
    elif mask.dim() == 4 and mask.shape[2] in (1, query_length) and mask.shape[3] >= key_length:
        key_range = key_range_of_mask(mask)
        if key_range is not None and mask.shape[3] > key_length:
            key_range = key_range.clamp(max=key_length)
    else:
        return None
    if key_range is None:
        return None
    if key_length != query_length:
        key_length = max(min(reach_of_mask(mask, key_range), key_length), 1)
    if documents is not None:
        key_range = intersection(key_range, documents)
    return Visibility(query_length, key_length, False, None, key_range.expand(batch, query_length, -1))


def geoscale_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,  # (Lq,), what transformers 4.57 passes instead of q_length and q_offset
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,  # (B, any length), 0 = padding; keys beyond its end are hidden
    allow_is_causal_skip: bool = True,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """Mask of one forward for the `geoscale` attention; registered with `AttentionMaskInterface`.

    Returns:
        None where the layer's own causal and sliding-window flags say it all (the prompt of a static cache included); key ranges
        (B, 1, Lq, 2) int32 for padding, packing and a past (4D, which transformers passes on untouched); SDPA's own mask wherever
        SDPA will run (decoding) or ranges cannot express the mask.
    Raises:
        ValueError: an empty sequence.
    """
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
        kwargs["cache_position"] = cache_position
    else:
        device = device if attention_mask is None else attention_mask.device
        kwargs |= {"q_length": q_length, "q_offset": q_offset} | ({} if device is None else {"device": device})
    if not q_length:
        raise ValueError("FP8 attention needs sequences of at least one token, got length 0")
    decoding = q_length == 1 < kv_length
    if not decoding and kv_length != 2 and not kwargs.get("use_vmap", False):
        past = int(q_offset if cache_position is None else cache_position[0])
        padding = _padding(attention_mask, kv_offset, kv_length)
        plain = past == kv_offset == 0 and allow_is_causal_skip and _is_window_of_layer(kv_length, **kwargs)
        if plain and (padding is None or bool(padding[:, :q_length].all())):
            return None
        if past == 0 or q_length >= CONTINUATION_ROWS:
            rows = torch.arange(q_length, device=device) + past if cache_position is None else cache_position
            keys = torch.arange(kv_length, device=device) + kv_offset
            ranges = _ranges_of_function(mask_function, padding, batch_size, rows, keys)
            if ranges is not None:
                if padding is None and not allow_is_causal_skip and past == 0:
                    say_that_positions_are_documents(ranges)
                return ranges[:, None]
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _padding(attention_mask: Tensor | None, offset: int, length: int) -> Tensor | None:
    """Which keys hold a token: (B, Lk) bool."""
    if attention_mask is None:
        return None
    missing = offset + length - attention_mask.shape[1]
    return F.pad(attention_mask.bool(), (0, max(missing, 0)))[:, offset : offset + length]


_WINDOW_IN_MASK_ONLY = ("phimoe", "qwen2_moe")
"""Families whose attention passes no `sliding_window` to the attention interface (transformers 5.23): the mask alone has it."""


def _is_window_of_layer(kv_length: int, local_size: int | None = None, config=None, **_) -> bool:
    """Whether a causal mask, cut to `local_size`, is what the layer's own flags say: its sliding window is, a chunk is not."""
    if local_size is None or kv_length < local_size:
        return True
    if getattr(config, "model_type", None) in _WINDOW_IN_MASK_ONLY:
        return False
    return local_size == getattr(config, "sliding_window", None)


def _ranges_of_function(
    mask_function,
    padding: Tensor | None,  # (B, Lk)
    batch_size: int,
    rows: Tensor,  # (Lq,) positions of the queries
    keys: Tensor,  # (Lk,) positions of the keys
) -> Tensor | None:
    batch = torch.arange(batch_size, device=keys.device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=keys.device)

    def rows_of(start: int, stop: int) -> Tensor:
        visible = mask_function(batch, head, rows[None, start:stop, None], keys[None, None])
        visible = visible if padding is None else visible & padding[:, None]
        return visible.expand(batch_size, stop - start, keys.shape[0])

    return _ranges_by_rows(rows_of, rows.shape[0])
