"""Rotary position embeddings inside the kernels: q and k are turned as they are loaded, gradients turned back. Triton."""

import triton
import triton.language as tl

from .launcher import DirectKernel
from .qk_norm_tile import inverse_rms, normalised


@triton.jit
def load_rotated(
    p_x, p_cos, p_sin, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, cos_b, cos_l, D: tl.constexpr,
    DP: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr, p_norm, norm_eps, NORM: tl.constexpr,
):  # fmt: skip
    """`load_rows`, the first TURNED channels turned as by `rotary.rotate`, or turned back: (rows, DP) in x's dtype.

    With NORM, rows get their RMS norm first.

    Each channel's partner is loaded again, which the L1 cache answers.
    """
    HALF: tl.constexpr = TURNED // 2
    dims = tl.arange(0, DP)
    if INTERLEAVED:
        first, partner, angle = dims % 2 == 0, dims ^ 1, dims // 2
    else:
        first = dims < HALF
        partner = tl.where(first, dims + HALF, dims - HALF)
        angle = tl.where(first, dims, dims - HALF)
    is_turned = dims < TURNED
    partner = tl.where(is_turned, partner, dims)
    valid = rows[:, None] < n_rows
    p_rows = p_x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + rows[:, None].to(tl.int64) * stride_l
    x = tl.load(p_rows + dims[None, :] * stride_d, mask=valid & (dims[None, :] < D), other=0.0)
    y = tl.load(p_rows + partner[None, :] * stride_d, mask=valid & is_turned[None, :], other=0.0)
    dtype = x.dtype
    if NORM:
        inverse = inverse_rms(x, norm_eps, D)
        x, y = normalised(x, inverse, p_norm, dims, D), normalised(y, inverse, p_norm, partner, D)
    o_angle = batch.to(tl.int64) * cos_b + rows[:, None].to(tl.int64) * cos_l + angle[None, :]
    cos = tl.load(p_cos + o_angle, mask=valid & is_turned[None, :], other=1.0).to(tl.float32)
    sin = tl.load(p_sin + o_angle, mask=valid & is_turned[None, :], other=0.0).to(tl.float32)
    sin = tl.where((first != BACK)[None, :], -sin, sin)
    return (x.to(tl.float32) * cos + y.to(tl.float32) * sin).to(dtype)


@DirectKernel
@triton.jit
def rotate_back_kernel(
    p_x,  # (B, H, L, D), any strides: a gradient, changed in place
    p_cos,  # (B or 1, L, R/2)
    p_sin,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    cos_b,
    cos_l,
    n_heads,
    n_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient with respect to what RoPE turned, from that with respect to what it gave."""
    i_head = tl.program_id(0)
    batch, head, rows = i_head // n_heads, i_head % n_heads, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = load_rotated(
        p_x, p_cos, p_sin, batch, head, rows, n_rows, stride_b, stride_h, stride_l, stride_d, cos_b, cos_l, D, DP, TURNED,
        INTERLEAVED, True, None, 0.0, False,
    )  # fmt: skip
    tl.debug_barrier()  # every warp has read before any writes: partners may lie in another warp's part
    dims = tl.arange(0, DP)
    p_tile = p_x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    p_tile += rows[:, None].to(tl.int64) * stride_l + dims[None, :] * stride_d
    tl.store(p_tile, x, mask=(rows[:, None] < n_rows) & (dims[None, :] < D))
