"""The mask side of the attention interface: turn what transformers asks for into per-row key ranges."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..kernels import key_range_of_block

MASK_ROWS = 256
"""Rows of a mask evaluated at a time, so that no L×L mask is ever stored."""

_ranges = WeakTensorKeyDictionary()  # explicit 4D mask → (version, key ranges or None): one analysis for all layers


def _ranges_by_rows(rows_of, query_length: int) -> Tensor | None:
    """Key ranges (B, Lq, 2) int32 of a mask given as rows_of(start, stop) → (B, rows, Lk) bool; None if a row has holes."""
    pieces = []
    for start in range(0, query_length, MASK_ROWS):
        ranges, contiguous = key_range_of_block(rows_of(start, min(start + MASK_ROWS, query_length)))
        if not bool(contiguous):
            return None
        pieces.append(ranges.to(torch.int32))
    return torch.cat(pieces, dim=1)


def key_range_of_mask(
    mask: Tensor,  # (B, 1, Lq, Lk), bool (True = visible) or additive (0 = visible, ≤ half of finfo.min or -inf = hidden)
) -> Tensor | None:
    """Key ranges (B, Lq, 2) of an explicit mask, or None when it is no mask of contiguous ranges (holes, biases, per head)."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    version = None if mask.is_inference() else mask._version  # inference tensors do not count their changes
    known = _ranges.get(mask)
    if known is not None and known[0] == version is not None:
        return known[1]
    if mask.dtype == torch.bool:
        visible = mask[:, 0]
    elif mask.is_floating_point():
        hidden = mask[:, 0] <= torch.finfo(mask.dtype).min / 2
        visible = ~hidden
        if bool((mask[:, 0].masked_fill(hidden, 0) != 0).any()):
            return None
    else:
        return None
    ranges = _ranges_by_rows(lambda start, stop: visible[:, start:stop], mask.shape[2])
    _ranges[mask] = (version, ranges)
    return ranges


def geoscale_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int = 0,
    cache_position: Tensor | None = None,  # transformers 4.57 passes this instead of q_length and q_offset
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,  # (B, ≥ Lk), 0 = padding
    allow_is_causal_skip: bool = True,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """Mask of one forward for the `geoscale` attention; registered with `AttentionMaskInterface`.

    Returns:
        None where the layer's own causal and sliding-window flags say it all; key ranges (B, 1, Lq, 2) int32 for padding and
        packing (4D, which transformers passes on untouched); SDPA's own mask wherever SDPA will run (with a cache) or ranges
        cannot express the mask.
    """
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], int(cache_position[0]), cache_position.device
    if attention_mask is not None:
        device = attention_mask.device
    if q_length == kv_length and q_offset == 0 and kv_offset == 0:
        padding = None if attention_mask is None else attention_mask[:, :kv_length].bool()
        if padding is None or (padding.shape[-1] == kv_length and bool(padding.all())):
            if allow_is_causal_skip:
                return None
            padding = None
        if not kwargs.get("use_vmap", False) and (padding is None or padding.shape[-1] == kv_length):
            ranges = _ranges_of_function(mask_function, padding, batch_size, kv_length, device)
            if ranges is not None:
                return ranges[:, None]
    if cache_position is None:
        kwargs |= {"q_length": q_length, "q_offset": q_offset} | ({} if device is None else {"device": device})
    else:
        kwargs["cache_position"] = cache_position
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _ranges_of_function(mask_function, padding: Tensor | None, batch_size: int, length: int, device) -> Tensor | None:
    batch = torch.arange(batch_size, device=device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    keys = torch.arange(length, device=device)[None, None, :]

    def rows_of(start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=device)[None, :, None]
        visible = mask_function(batch, head, rows, keys)
        visible = visible if padding is None else visible & padding[:, None]
        return visible.expand(batch_size, stop - start, length)

    return _ranges_by_rows(rows_of, length)
