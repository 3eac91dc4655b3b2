"""What operands of `fp8_attention` must be: ValueError and TypeError say what was expected and what came."""

import torch
from torch import Tensor

HEAD_DIM_STEP, HEAD_DIM_MAX = 16, 256
"""Head dimensions are multiples of 16 up to 256: what FP8 matrix units contract over, and what the kernels tile."""

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    device = query.device
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in OPERAND_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, query on {device}; they must share one device")
    (batch, heads, rows, dim), (key_batch, kv_heads, keys, key_dim) = query.shape, key.shape
    if key.shape != value.shape or key_batch != batch or key_dim != dim:
        raise ValueError(
            "key and value must share one shape (B, Hkv, Lk, D) with query's B and D, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {heads} and {kv_heads}")
    check_head_dim(dim)
    if not batch or not rows or not keys:
        raise ValueError(
            f"batches and sequences must not be empty, got {batch} sequences of {rows} query rows and {keys} keys"
        )


def check_scales(scales: tuple[Tensor, Tensor, Tensor, Tensor | None], heads: int, kv_heads: int) -> None:
    for operand, x, count in zip(("q", "k", "v", "logit"), scales, (heads, kv_heads, kv_heads, heads), strict=True):
        if x is not None and (x.dtype != torch.float32 or x.shape != (count,)):
            raise ValueError(
                f"{operand}_quant_scale must be float32 of shape ({count},), got {x.dtype} {tuple(x.shape)}"
            )


def check_rotary(rotary: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> None:
    cos, sin = rotary
    shape, (batch, _, length, dim) = cos.shape, query.shape
    if len(shape) != 3 or shape != sin.shape or shape[0] not in (1, batch) or shape[1] != length:
        raise ValueError(
            f"rotary must be cos and sin of shape (1 or {batch}, {length}, R/2), got {tuple(shape)} and {tuple(sin.shape)}"
        )
    if not 0 < 2 * shape[2] <= dim:
        raise ValueError(f"rotary turns R = 2 x {shape[2]} channels, but the head dimension is {dim}")
    if key.shape[2] != length:
        raise ValueError(
            f"rotary needs as many keys as queries, got {key.shape[2]} and {length}; rotate them before the call"
        )
    if cos.device != query.device or sin.device != query.device:
        raise ValueError(
            f"rotary is on {cos.device} and {sin.device}, query on {query.device}; they must share one device"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise TypeError(f"rotary's cos and sin must be floating point, got {cos.dtype} and {sin.dtype}")


def check_qk_norm(qk_norm: tuple[Tensor, Tensor, float], query: Tensor) -> None:
    *weights, eps = qk_norm
    dim = query.shape[3]
    for name, weight in zip("qk", weights, strict=True):
        if weight.shape != (dim,):
            raise ValueError(f"qk_norm's weight of {name} must be of shape ({dim},), got {tuple(weight.shape)}")
        if weight.device != query.device:
            raise ValueError(
                f"qk_norm's weight of {name} is on {weight.device}, query on {query.device}; they must share one device"
            )
        if weight.dtype not in OPERAND_DTYPES:
            raise TypeError(f"qk_norm's weight of {name} must be float32, bfloat16 or float16, got {weight.dtype}")
    if not SMALLEST_NORMAL <= eps < float("inf"):
        raise ValueError(
            f"qk_norm's epsilon must be positive and normal in float32 ({SMALLEST_NORMAL:.1e} on), got {eps}"
        )


def _are_rows(rows: Tensor, x: Tensor) -> bool:
    """Whether x (B, H, L, D) is a view of rows (B, L, H·D)."""
    batch, heads, length, dim = x.shape
    if rows.shape != (batch, length, heads * dim) or rows.data_ptr() != x.data_ptr() or rows.dtype != x.dtype:
        return False
    sequence, row, entry = rows.stride()
    strides = (sequence, dim * entry, row, entry)  # where there is one entry only, any
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))


def _described(packed: object) -> str:
    kind = type(packed).__name__
    return f"a {kind} of {len(packed)}" if isinstance(packed, (tuple, list)) else f"a {kind}"


def check_packed(packed: Tensor | tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> None:
    if not isinstance(packed, (Tensor, tuple)) or (isinstance(packed, tuple) and len(packed) != 3):
        raise TypeError(f"packed must be a tensor or a tuple of three, got {_described(packed)}")
    if isinstance(packed, tuple):
        for name, rows, x in zip(("query", "key", "value"), packed, (query, key, value), strict=True):
            if not _are_rows(rows, x):
                raise ValueError(
                    f"{name} must be a view of its tensor in packed, (B, L, H·D) as (B, L, H, D) transposed, got "
                    f"{name} {tuple(x.shape)} with strides {x.stride()} and packed {tuple(rows.shape)} with {rows.stride()}"
                )
        return
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    counts = (heads, kv_heads, kv_heads)
    if packed.dim() == 3 and packed.shape[2] == sum(counts) * dim:
        views = packed.unflatten(2, (-1, dim)).transpose(1, 2).split(counts, dim=1)
        pairs = list(zip((query, key, value), views, strict=True))
        if all(x.shape == y.shape and x.data_ptr() == y.data_ptr() and x.stride() == y.stride() for x, y in pairs):
            return
    raise ValueError(
        f"query, key and value must be views of packed, {heads}, {kv_heads} and {kv_heads} heads of {dim} channels in this order, "
        f"got packed {tuple(packed.shape)} and query {tuple(query.shape)}"
    )


def check_head_dim(dim: int) -> None:
    """Raise ValueError unless FP8 attention has this head dimension."""
    if dim % HEAD_DIM_STEP or not 0 < dim <= HEAD_DIM_MAX:
        raise ValueError(
            f"FP8 attention needs a head dimension that is a multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX}, got {dim}"
        )
