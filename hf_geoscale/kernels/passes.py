"""The fused backend's two passes, forward and backward: which kernels run on what, and what they leave."""

import torch
from torch import Tensor

from . import hopper, launch
from .counters import counters_of, empty_like_zeroed, v_norm_of, zeroed
from .hadamard import SIGNS_MAX, hadamard_block, hadamard_signs
from .launch import Call
from .qk_norm_tile import empty_norm_gradient, norm_gradient
from .quantize import quantize_kernel, transpose_kernel
from .quantize_gradient import gradient_range_kernel, quantize_gradient_kernel
from .reference import GRADIENT_ROWS
from .tiles import SEQUENCE_PADDING, cdiv, padded_head_dim

QUANTIZE_ROWS = 64
"""Rows of one program of the quantising kernels; divides SEQUENCE_PADDING and GRADIENT_ROWS."""


def _padded(length: int) -> int:
    return (length + SEQUENCE_PADDING - 1) // SEQUENCE_PADDING * SEQUENCE_PADDING


def _like_heads_inside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty (B, H, L, D) over (B, L, H, D) memory: the layout Transformers works in, so that no copy follows."""
    batch, heads, length, dim = x.shape
    row = heads * dim
    return torch.empty_strided((batch, heads, length, dim), (length * row, dim, row, 1), dtype=dtype, device=x.device)


def _packed_like(q8: Tensor, k8: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty (B, L, Hq + 2·Hkv, D): what one fused projection of q, k and v gives."""
    batch, heads, length, dim = q8.shape
    return torch.empty(batch, length, heads + 2 * k8.shape[1], dim, dtype=dtype, device=q8.device)


def _call(
    q_quant_scale: Tensor, k_quant_scale: Tensor, v_quant_scale: Tensor, logit_quant_scale: Tensor | None, key_range: Tensor | None,
    dropout_seed: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool, softmax_scale: float, softcap: float,
    causal: bool, window: int, dropout_p: float, incoherent: bool, high: bool, dim: int,
) -> Call:  # fmt: skip
    mix = hadamard_block(dim) if incoherent else 0
    signs = hadamard_signs(min(padded_head_dim(dim), SIGNS_MAX), mix, q_quant_scale.device) if mix else None
    return Call(
        q_quant_scale, k_quant_scale, v_quant_scale, key_range, dropout_seed, softmax_scale, causal, window, dropout_p, high, dim,
        signs, mix, logit_quant_scale, GRADIENT_ROWS, softcap, cos, sin, interleaved,
    )  # fmt: skip


def forward(
    query: Tensor,  # (B, Hq, Lq, D), any strides
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    q_quant_scale: Tensor,  # (Hq,), contiguous as all scales: kernels read them as plain arrays
    k_quant_scale: Tensor,  # (Hkv,)
    v_quant_scale: Tensor,  # (Hkv,)
    key_range: Tensor | None,  # (B, Lq, 2) int32, contiguous
    dropout_seed: Tensor | None,  # () int64
    gradient_overflow: Tensor | None,  # (1,) int64: where the backward adds its count
    logit_quant_scale: Tensor | None,  # (Hq,)
    cos: Tensor | None,  # (B or 1, L, R/2), last stride 1: RoPE of query and key
    sin: Tensor | None,  # same strides
    interleaved: bool,
    softmax_scale: float,
    softcap: float,  # 0: none
    causal: bool,
    window: int,  # 0: none
    dropout_p: float,
    incoherent: bool,
    high: bool,
    count: bool,
    observe: bool,
    q_norm: Tensor | None = None,  # (D,), contiguous: RMS norms of query and key
    k_norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """FP8 attention by the fused kernels.

    Returns:
        out (B, Hq, Lq, D) in query's dtype; shift and row_sum (B, Hq, Lq) float32: row maximum of the base-2 logits less 8, and
        Σ P̃; q8, k8 (B, H, L, D), k8's residual (empty unless `high`), v8 (B, Hkv, D, Lp); and the buffer of `counters`, with
        overflow and amax if `count`, with logit_max if `observe` or with a logit_quant_scale.
    """
    observe = observe or logit_quant_scale is not None
    counted = zeroed(query.shape[0], query.shape[1], key.shape[1], count, observe, query.device)
    outputs = forward_into(
        counted, query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, key_range, dropout_seed, gradient_overflow,
        logit_quant_scale, cos, sin, interleaved, softmax_scale, softcap, causal, window, dropout_p, incoherent, high, count,
        observe, q_norm, k_norm, norm_eps,
    )  # fmt: skip
    return *outputs, counted


def forward_into(
    counted, query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, key_range, dropout_seed, gradient_overflow,
    logit_quant_scale, cos, sin, interleaved, softmax_scale, softcap, causal, window, dropout_p, incoherent, high, count, observe,
    q_norm=None, k_norm=None, norm_eps=0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` that counts into a buffer of zeros, `counted`, and does not return it."""
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    device, e4m3 = query.device, torch.float8_e4m3fn
    call = _call(
        q_quant_scale, k_quant_scale, v_quant_scale, logit_quant_scale, key_range, dropout_seed, cos, sin, interleaved,
        softmax_scale, softcap, causal, min(window, n_keys), dropout_p, incoherent, high, dim,
    )  # fmt: skip
    padded = _padded(n_keys)
    q8 = torch.empty(query.shape, dtype=e4m3, device=device)
    k8 = torch.empty(key.shape, dtype=e4m3, device=device)
    residual = torch.empty(key.shape if high else (0,), dtype=e4m3, device=device)
    v8 = torch.empty(batch, kv_heads, dim, padded, dtype=e4m3, device=device)
    observe = observe or logit_quant_scale is not None
    overflow, amax, logit_max, v_norm = counters_of(counted, batch, heads, kv_heads, count, observe)
    grid = (batch * (heads + 2 * kv_heads), cdiv(max(n_queries, padded), QUANTIZE_ROWS))
    quantize_kernel[grid](
        query, key, value, *call.scales, call.signs, q8, k8, residual, v8, v_norm, amax, overflow, cos, sin, q_norm, k_norm,
        *query.stride(), *key.stride(), *value.stride(), *call.angle_strides, norm_eps, batch, heads, kv_heads, n_queries, n_keys,
        padded, D=dim, DP=call.padded_dim, TURNED=call.turned, INTERLEAVED=interleaved, NORM=q_norm is not None, MIX=call.mix,
        HIGH=high, COUNT=count, BLOCK=QUANTIZE_ROWS,
    )  # fmt: skip

    out = _like_heads_inside(query, query.dtype)
    shift = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=device)
    row_sum = torch.empty_like(shift)
    kernels = hopper.launches_for(call, device, counters=observe) or launch
    kernels.forward(call, q8, k8, residual, v8, out, shift, row_sum, logit_max, overflow)
    return out, shift, row_sum, q8, k8, residual, v8


def fake_forward(
    query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, key_range, dropout_seed, gradient_overflow,
    logit_quant_scale, cos, sin, interleaved, softmax_scale, softcap, causal, window, dropout_p, incoherent, high, count, observe,
    q_norm=None, k_norm=None, norm_eps=0.0,
):  # fmt: skip
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    e4m3 = torch.float8_e4m3fn
    padded = _padded(n_keys)
    rows = query.new_empty(batch, heads, n_queries, dtype=torch.float32)
    return (
        _like_heads_inside(query, query.dtype),
        rows,
        torch.empty_like(rows),
        query.new_empty(query.shape, dtype=e4m3),
        key.new_empty(key.shape, dtype=e4m3),
        key.new_empty(key.shape if high else (0,), dtype=e4m3),
        key.new_empty(batch, kv_heads, dim, padded, dtype=e4m3),
        empty_like_zeroed(query, batch, heads, kv_heads, count, observe or logit_quant_scale is not None),
    )


def backward(
    grad_out: Tensor,  # (B, Hq, Lq, D), any strides
    out: Tensor,  # (B, Hq, Lq, D)
    shift: Tensor,  # (B, Hq, Lq)
    row_sum: Tensor,  # (B, Hq, Lq)
    q8: Tensor,  # (B, Hq, Lq, D)
    k8: Tensor,  # (B, Hkv, Lk, D)
    residual: Tensor,  # (B, Hkv, Lk, D), or empty
    v8: Tensor,  # (B, Hkv, D, Lp)
    counted: Tensor,  # (N,) as the forward left it
    q_quant_scale: Tensor,
    k_quant_scale: Tensor,
    v_quant_scale: Tensor,
    key_range: Tensor | None,
    dropout_seed: Tensor | None,
    gradient_overflow: Tensor | None,
    logit_quant_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    softmax_scale: float,
    softcap: float,  # 0: none
    causal: bool,
    window: int,
    dropout_p: float,
    incoherent: bool,
    packed: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    query: Tensor | None = None,  # (B, Hq, Lq, D), with q_norm: what it normalised
    key: Tensor | None = None,  # (B, Hkv, Lk, D)
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ (B, Hq, Lq, D), dK and dV (B, Hkv, Lk, D), with respect to the unquantised, unmixed operands. Deterministic.

    `packed`: instead one tensor (B, L, Hq + 2·Hkv, D) of all three in q_dtype, and two empty ones. Last comes what gives the
    gradients of q_norm and k_norm when summed over all but heads and channels (`empty_norm_gradient`); empty without them.
    """
    batch, heads, n_queries, dim = q8.shape
    kv_heads, n_keys = k8.shape[1:3]
    device, high, survival = q8.device, residual.numel() > 0, 1 - dropout_p
    call = _call(
        q_quant_scale, k_quant_scale, v_quant_scale, logit_quant_scale, key_range, dropout_seed, cos, sin, interleaved,
        softmax_scale, softcap, causal, min(window, n_keys), dropout_p, incoherent, high, dim,
    )  # fmt: skip
    padded_dim, n_groups = call.padded_dim, cdiv(n_queries, GRADIENT_ROWS)

    gradient_range = torch.zeros(batch, heads, n_groups, 2, dtype=torch.float32, device=device)
    grid = (batch * heads, cdiv(n_queries, QUANTIZE_ROWS))
    gradient_range_kernel[grid](
        grad_out, row_sum, gradient_range, *grad_out.stride(), heads, n_queries, n_groups, GRADIENT_ROWS, dim, padded_dim,
        QUANTIZE_ROWS,
    )  # fmt: skip
    kernels = hopper.launches_for(call, device, counters=gradient_overflow is not None) or launch
    tiles = kernels.stored_tiles(call, q8, k8)
    padded = _padded(n_queries)
    grad8 = torch.empty_like(q8)
    grad8_columns = torch.empty(batch, heads, dim, padded, dtype=q8.dtype, device=device)
    row_factor, row_delta = torch.empty(2, batch, heads, n_queries, dtype=torch.float32, device=device).unbind()
    of_rows = torch.empty(3, batch, heads, padded, dtype=torch.float32, device=device)
    group_delta, group_shift, group_ratio = of_rows.unbind()
    group = torch.empty(batch, heads, n_groups, 4, dtype=torch.float32, device=device)
    quantize_gradient_kernel[batch * heads, padded // QUANTIZE_ROWS](
        grad_out, out, shift, row_sum, gradient_range, v_norm_of(counted, batch, kv_heads), q_quant_scale, v_quant_scale, grad8,
        grad8_columns, row_factor, row_delta, group_delta, group_shift, group_ratio, group, *grad_out.stride(), *out.stride(),
        heads, kv_heads, n_queries, padded, n_groups, softmax_scale, survival, GRADIENT_ROWS, dim, padded_dim, tiles is not None,
        QUANTIZE_ROWS,
    )  # fmt: skip
    v8_rows = torch.empty_like(k8)
    q8_columns, k8_columns = torch.empty_like(grad8_columns), torch.empty_like(v8)
    residual_columns = torch.empty_like(v8) if high else k8_columns
    residual = residual if high else k8
    transpose_kernel[batch * (heads + 2 * kv_heads), cdiv(max(padded, v8.shape[3]), QUANTIZE_ROWS)](
        q8, k8, residual, v8, q8_columns, k8_columns, residual_columns, v8_rows, batch, heads, kv_heads, n_queries, padded,
        n_keys, v8.shape[3], dim, padded_dim, high, tiles is not None, QUANTIZE_ROWS,
    )  # fmt: skip

    if packed:
        together = _packed_like(q8, k8, q_dtype)
        dq, dk, dv = together.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    else:
        dq = _like_heads_inside(q8, q_dtype)
        dk, dv = _like_heads_inside(k8, k_dtype), _like_heads_inside(k8, v_dtype)
    if tiles is not None:
        kernels.gradients(
            call, tiles, q8, q8_columns, k8, k8_columns, v8_rows, grad8, grad8_columns, group_shift, group_delta, group_ratio,
            row_factor, group, dq, dk, dv,
        )  # fmt: skip
    else:
        kernels.query_gradient(
            call, q8, k8, k8_columns, residual, residual_columns, v8_rows, grad8, shift, row_factor, row_delta, group,
            gradient_overflow, dq,
        )  # fmt: skip
        kernels.key_gradient(
            call, q8, q8_columns, k8, residual, v8_rows, grad8, grad8_columns, group_shift, group_delta, group, dk, dv
        )
    if query is None or key is None or q_norm is None or k_norm is None:
        partial = group.new_empty(0)
    else:
        partial = norm_gradient(query, key, q_norm, k_norm, norm_eps, dq, dk)
    return (together, together.new_empty(0), together.new_empty(0), partial) if packed else (dq, dk, dv, partial)


def fake_backward(
    grad_out, out, shift, row_sum, q8, k8, residual, v8, counted, q_quant_scale, k_quant_scale, v_quant_scale, key_range,
    dropout_seed, gradient_overflow, logit_quant_scale, cos, sin, interleaved, softmax_scale, softcap, causal, window, dropout_p,
    incoherent, packed, q_dtype, k_dtype, v_dtype, query=None, key=None, q_norm=None, k_norm=None, norm_eps=0.0,
):  # fmt: skip
    partial = shift.new_empty(0) if query is None or key is None else empty_norm_gradient(query, key)
    if packed:
        together = _packed_like(q8, k8, q_dtype)
        return together, together.new_empty(0), together.new_empty(0), partial
    return _like_heads_inside(q8, q_dtype), _like_heads_inside(k8, k_dtype), _like_heads_inside(k8, v_dtype), partial
