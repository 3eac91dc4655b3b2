"""RMS norms of q and k inside the kernels: rows are normalised as they are loaded, gradients sent back in place. Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import DirectKernel
from .tiles import cdiv, padded_head_dim

TILE = 4096
"""Elements of one tile of the gradient: 32 a thread, so that the four tiles it holds fit the registers of four warps."""
CHUNK_ROWS = 512
"""Rows of one program of the gradient, whose share of the weights' gradients is one sum. A guess."""


@triton.jit
def inverse_rms(x, eps, D: tl.constexpr):
    """1 / √(mean(x²) + eps) of each row: (rows, DP) → (rows,) float32."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)


@triton.jit
def normalised(x, inverse, p_weight, channels, D: tl.constexpr):
    """Channels of rows of this inverse RMS, as by `qk_norm.rms_norm`: (rows, DP), in float32 unless weight and x share a dtype."""
    weight = tl.load(p_weight + channels, mask=channels < D, other=0.0)
    unit = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    y = unit.to(tl.float32) * weight.to(tl.float32)[None, :]
    if weight.dtype == x.dtype:
        y = y.to(x.dtype)
    return y


@triton.jit
def norm_gradient_rows(
    p_x, p_grad, p_weight, p_partial, x_b, x_h, x_l, x_d, grad_b, grad_h, grad_l, batch, head, n_rows, eps, D: tl.constexpr,
    DP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of one head: their gradients in place, and what they add to the weight's, (D,) at p_partial."""
    dims = tl.arange(0, DP)
    p_x += batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h
    p_grad += batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h
    weight = tl.load(p_weight + dims, mask=dims < D, other=0.0).to(tl.float32)
    total = tl.zeros((DP,), tl.float32)
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, n_rows), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        valid = (rows[:, None] < n_rows) & (dims[None, :] < D)
        x = tl.load(p_x + rows[:, None].to(tl.int64) * x_l + dims[None, :] * x_d, mask=valid, other=0.0)
        p_tile = p_grad + rows[:, None].to(tl.int64) * grad_l + dims[None, :]
        grad = tl.load(p_tile, mask=valid, other=0.0)
        inverse = inverse_rms(x, eps, D)
        unit = x.to(tl.float32) * inverse[:, None]
        total += tl.sum(grad.to(tl.float32) * unit.to(x.dtype).to(tl.float32), 0)
        along = grad.to(tl.float32) * weight[None, :]
        along = (along - unit * (tl.sum(along * unit, 1) / D)[:, None]) * inverse[:, None]
        tl.store(p_tile, along.to(grad.dtype), mask=valid)
    tl.store(p_partial + dims, total, mask=dims < D)


@DirectKernel
@triton.jit
def norm_gradient_kernel(
    p_q,  # (B, Hq, Lq, D), any strides: what was normalised
    p_k,  # (B, Hkv, Lk, D)
    p_q_norm,  # (D,)
    p_k_norm,  # (D,)
    p_dq,  # (B, Hq, Lq, D), last stride 1: a gradient, changed in place
    p_dk,  # (B, Hkv, Lk, D)
    p_partial,  # (B, Hq + Hkv, chunks, D)
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    dq_b,
    dq_h,
    dq_l,
    dk_b,
    dk_h,
    dk_l,
    n_heads,
    n_kv_heads,
    n_queries,
    n_keys,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both operands in one launch: program (i, chunk) takes head i % (Hq + Hkv) of q, or beyond those of k."""
    i_head = tl.program_id(0)
    batch, head = i_head // (n_heads + n_kv_heads), i_head % (n_heads + n_kv_heads)
    p_partial += (i_head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
    if head < n_heads:
        norm_gradient_rows(
            p_q,
            p_dq,
            p_q_norm,
            p_partial,
            q_b,
            q_h,
            q_l,
            q_d,
            dq_b,
            dq_h,
            dq_l,
            batch,
            head,
            n_queries,
            eps,
            D,
            DP,
            CHUNK,
            BLOCK,
        )
    else:
        norm_gradient_rows(
            p_k, p_dk, p_k_norm, p_partial, k_b, k_h, k_l, k_d, dk_b, dk_h, dk_l, batch, head - n_heads, n_keys, eps, D, DP, CHUNK,
            BLOCK,
        )  # fmt: skip


def empty_norm_gradient(query: Tensor, key: Tensor) -> Tensor:
    """Empty (B, Hq + Hkv, chunks, D) float32: what the rows of each chunk add to the gradient of their norm's weight."""
    batch, heads, n_queries, dim = query.shape
    n_chunks = cdiv(max(n_queries, key.shape[2]), CHUNK_ROWS)
    return torch.empty(batch, heads + key.shape[1], n_chunks, dim, dtype=torch.float32, device=query.device)


def norm_gradient(
    query: Tensor,  # (B, Hq, Lq, D), any strides
    key: Tensor,  # (B, Hkv, Lk, D)
    q_norm: Tensor,  # (D,)
    k_norm: Tensor,  # (D,)
    eps: float,
    dq: Tensor,  # (B, Hq, Lq, D), last stride 1
    dk: Tensor,  # (B, Hkv, Lk, D)
) -> Tensor:
    """Turn dQ and dK, of what the norms gave, in place into those of what they took. Returns `empty_norm_gradient`, filled."""
    partial = empty_norm_gradient(query, key)
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    padded_dim = padded_head_dim(dim)
    norm_gradient_kernel[batch * (heads + kv_heads), partial.shape[2]](
        query, key, q_norm, k_norm, dq, dk, partial, *query.stride(), *key.stride(), *dq.stride()[:3], *dk.stride()[:3], heads,
        kv_heads, n_queries, n_keys, eps, D=dim, DP=padded_dim, CHUNK=CHUNK_ROWS, BLOCK=TILE // padded_dim,
    )  # fmt: skip
    return partial
