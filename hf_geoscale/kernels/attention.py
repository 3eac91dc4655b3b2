"""`fp8_attention`: the functional op, with its checks and its autograd formula."""

import torch
from torch import Tensor

from . import reference
from .statistics import AttentionStatistics
from .visibility import Visibility

HEAD_DIM_STEP, HEAD_DIM_MAX = 16, 256
"""Head dimensions are multiples of 16 up to 256: what FP8 matrix units contract over, and what the kernels tile."""


class _FP8Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, visibility, options, precision, stats
    ):
        with torch.autocast(query.device.type, enabled=False):
            operands = reference.quantize(
                query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, options, precision, stats
            )
            out, row_max, row_sum = reference.forward(operands, visibility, options, query.dtype, stats)
        ctx.save_for_backward(
            operands.q8,
            operands.k8,
            operands.v8,
            operands.k8_residual,
            operands.q_descale,
            operands.k_descale,
            operands.v_descale,
            out,
            row_max,
            row_sum,
        )
        ctx.visibility, ctx.options, ctx.stats = visibility, options, stats
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        return out

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fp8_attention has first derivatives only; its backward was called with create_graph=True"
            )
        *saved, out, row_max, row_sum = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grads = reference.backward(
                grad_out, out, row_max, row_sum, reference.Operands(*saved), ctx.visibility, ctx.options, ctx.stats
            )
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), *[None] * 7


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    batch, heads, _, dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            "key and value must share one shape (B, Hkv, Lk, D) with query's B and D, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {heads} and {key.shape[1]}")
    check_head_dim(dim)
    if not query.shape[2] or not key.shape[2]:
        raise ValueError(f"sequences must not be empty, got {query.shape[2]} query rows and {key.shape[2]} keys")


def check_head_dim(dim: int) -> None:
    """Raise ValueError unless FP8 attention has this head dimension."""
    if dim % HEAD_DIM_STEP or not 0 < dim <= HEAD_DIM_MAX:
        raise ValueError(
            f"FP8 attention needs a head dimension that is a multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX}, got {dim}"
        )


def fp8_attention(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    *,
    q_quant_scale: Tensor,  # (Hq,)
    k_quant_scale: Tensor,  # (Hkv,)
    v_quant_scale: Tensor,  # (Hkv,)
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    key_range: Tensor | None = None,  # (B, Lq, 2)
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    incoherent: bool = True,
    precision: str = "standard",
    statistics: AttentionStatistics | None = None,
) -> Tensor:
    """Softmax attention with E4M3 operands, differentiable with E4M3 gradients; data flow in `kernels/reference.py`.

    Args:
        query, key, value: float32, bfloat16 or float16, any strides, RoPE already applied. Hq is a multiple of Hkv.
        q_quant_scale, k_quant_scale, v_quant_scale: float32 factors real → FP8 per head. 448/quant_scale must bound the
            2-norm of every row: v's also bounds the gradient of the logits.
        softmax_scale: factor on q·k; default D^-½.
        causal: row i sees keys up to i + Lk − Lq.
        window: with causal, a row sees at most this many keys, itself included.
        key_range: further restricts row i of sequence b to keys start ≤ j < stop (integers); an empty row gives 0.
        dropout_p: probability, in [0, 1), that an attention probability is dropped; survivors are divided by 1 − dropout_p.
        dropout_seed: 64-bit Philox seed; None draws one from torch's CPU generator.
        incoherent: mix q and k by an orthonormal Hadamard matrix first (halves their quantisation error).
        precision: "standard", or "high" for k as two FP8 terms.
        statistics: accumulates overflow counts and the range in use, in place.
    Returns:
        (B, Hq, Lq, D) in query's dtype; first derivatives only.
    Raises:
        ValueError: a shape, head dimension, window, probability or precision that is not as stated.
        TypeError: an operand that is not floating point.
    """
    _check_operands(query, key, value)
    heads, kv_heads = query.shape[1], key.shape[1]
    for name, given, count in (
        ("q_quant_scale", q_quant_scale, heads),
        ("k_quant_scale", k_quant_scale, kv_heads),
        ("v_quant_scale", v_quant_scale, kv_heads),
    ):
        if given.shape != (count,) or given.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 of shape ({count},), got {given.dtype} {tuple(given.shape)}")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window must be at least 1 and needs causal=True, got window={window}, causal={causal}")
    if key_range is not None and key_range.shape != (query.shape[0], query.shape[2], 2):
        raise ValueError(
            f"key_range must be (B, Lq, 2) = {(query.shape[0], query.shape[2], 2)}, got {tuple(key_range.shape)}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if precision not in ("standard", "high"):
        raise ValueError(f'precision must be "standard" or "high", got {precision!r}')
    if dropout_p and dropout_seed is None:
        dropout_seed = int(torch.randint(2**63 - 1, ()))
    options = reference.Options(
        query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, incoherent, dropout_p, dropout_seed or 0
    )
    visibility = Visibility(query.shape[2], key.shape[2], causal, window, key_range)
    return _FP8Attention.apply(
        query,
        key,
        value,
        q_quant_scale,
        k_quant_scale,
        v_quant_scale,
        visibility,
        options,
        precision,
        statistics or AttentionStatistics(),
    )
