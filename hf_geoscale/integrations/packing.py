"""Documents packed into one row: key ranges of FlashAttention's cumulative lengths, and what position ids are taken for.

transformers reads documents off position ids where it makes a mask without a 2D mask and without a cache; its mask then holds
them. Elsewhere positions are positions, whether they fall, repeat or jump.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

logger = logging.getLogger(__name__)

DOCUMENTS = (
    "geoscale: documents are read off position_ids: one starts where a position is not the one before it plus 1. transformers "
    "reads them so without an attention mask and without a cache. An attention mask of ones makes each row one document"
)
NO_DOCUMENTS = (
    "geoscale: position_ids fall or repeat, and an attention mask or a cache was given: transformers then takes them for "
    "positions only, and each row is one document. For packed documents pass use_cache=False and no attention_mask, or "
    "cu_seq_lens_q and cu_seq_lens_k (DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them)"
)

said: set[str] = set()
"""Messages that this process has logged."""

_falling = WeakTensorKeyDictionary()  # position ids → (version, whether they fall): one look for all layers
_lengths = WeakTensorKeyDictionary()  # cumulative lengths → (version, position ids, documents)


def version_of(tensor: Tensor) -> int | None:
    """Counts writes to a tensor; None for an inference tensor, whose writes nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _ranges_of_starts(
    starts: Tensor,  # (B, L) bool, the first column True
) -> Tensor:
    """Keys of each token's document: (B, L, 2) int32."""
    length = starts.shape[-1]
    index = torch.arange(length, device=starts.device)
    first = torch.where(starts, index, 0).cummax(-1).values
    following = F.pad(torch.where(starts, index, length)[:, 1:], (0, 1), value=length)
    stop = following.flip(-1).cummin(-1).values.flip(-1)
    return torch.stack([first, stop], dim=-1).to(torch.int32)


def _falls(position_ids: Tensor) -> Tensor:
    """Where a position is no larger than the one before it: (B, L) bool."""
    return F.pad(position_ids.diff(dim=-1) < 1, (1, 0))


def _say_once(message: str) -> None:
    said.add(message)
    logger.warning(message)


def say_that_positions_are_no_documents(
    position_ids: Tensor,  # (B or 1, L)
) -> None:
    """Log once that falling or repeating positions were taken for positions only. Waits for the device until that was said."""
    if NO_DOCUMENTS in said:
        return
    known, version = _falling.get(position_ids), version_of(position_ids)
    if known is None or known[0] != version:
        known = version, bool(_falls(position_ids).any())
        _falling[position_ids] = known
    if known[1]:
        _say_once(NO_DOCUMENTS)


def say_that_positions_are_documents(
    key_range: Tensor,  # (B, L, 2), of a prompt without padding
) -> None:
    """Log once that documents were read off positions: some token does not see the one before it."""
    if DOCUMENTS in said:
        return
    rows = torch.arange(1, key_range.shape[1], device=key_range.device)
    if bool((key_range[:, 1:, 0] == rows).any()):
        _say_once(DOCUMENTS)


def documents_of_lengths(
    cu_seq_lens_q: Tensor,  # (documents + 1,) integers from 0 to B·L
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,  # (B or 1, L)
    batch: int,
    length: int,
) -> Tensor:  # (B, L, 2) int32
    """Keys of each token's document, from the cumulative lengths of the flattened batch (transformers' FlashAttentionKwargs).

    Raises:
        ValueError: lengths that are not those of this batch, documents across rows, or positions that fall inside a document.
    """
    known, version = _lengths.get(cu_seq_lens_q), version_of(cu_seq_lens_q)
    if known is not None and known[0] == version is not None and known[1] is position_ids:
        return known[2]
    if (
        cu_seq_lens_k is not None
        and cu_seq_lens_k is not cu_seq_lens_q
        and not torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    ):
        raise ValueError("self-attention needs cu_seq_lens_q and cu_seq_lens_k to be the same, and they differ")
    bounds = cu_seq_lens_q.tolist() if cu_seq_lens_q.dim() == 1 else []
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != batch * length or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {batch * length} tokens of this batch, got "
            f"{bounds[:8] if bounds else tuple(cu_seq_lens_q.shape)}"
        )
    starts = torch.zeros(batch * length, dtype=torch.bool, device="cpu")
    starts[[bound for bound in bounds if bound < batch * length]] = True
    starts = starts.view(batch, length).to(cu_seq_lens_q.device)
    if not bool(starts[:, 0].all()):
        raise ValueError(f"no document of cu_seq_lens_q may span two rows of the batch, each of {length} tokens")
    if position_ids is not None and bool((_falls(position_ids).to(starts.device) & ~starts).any()):
        raise ValueError(
            "position_ids and cu_seq_lens_q disagree: a position falls inside a document. Pass the same documents in both"
        )
    documents = _ranges_of_starts(starts)
    _lengths[cu_seq_lens_q] = (version, position_ids, documents)
    return documents


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Keys in both of two key ranges, whose shapes (…, 2) broadcast; an empty row may have any start ≥ stop."""
    return torch.stack([torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])], dim=-1)
