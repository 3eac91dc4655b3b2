"""`fp8_attention`: the functional op, its checks, and the reference backend's autograd formula."""

import math

import torch
from torch import Tensor

from ..scaling.formats import E4M3
from . import reference
from .backend import PLAIN, TRITON_INSTALLED, resolve_backend
from .checks import check_operands, check_packed, check_qk_norm, check_rotary, check_scales
from .counters import counters_of, length_of
from .qk_norm import QKNorm, normalise_and_rotate
from .statistics import AttentionStatistics
from .visibility import Visibility

if TRITON_INSTALLED:
    from . import fused

SOFTCAP_MIN, SOFTCAP_MAX = 2.0**-20, 2.0**20
"""Soft caps that float32 serves: within them neither S/cap nor a hidden row's maximum leaves its range."""


class _ReferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, q_quant_scale, k_quant_scale, v_quant_scale, logit_quant_scale, visibility, options, precision,
        stats,
    ):  # fmt: skip
        with torch.autocast(query.device.type, enabled=False):
            scales = (q_quant_scale, k_quant_scale, v_quant_scale, logit_quant_scale)
            operands = reference.quantize(query, key, value, *scales, options, precision, stats)
            out, row_max, row_sum = reference.forward(operands, visibility, options, query.dtype, stats)
        ctx.save_for_backward(
            operands.q8,
            operands.k8,
            operands.v8,
            operands.k8_residual,
            operands.q_descale,
            operands.k_descale,
            operands.v_descale,
            operands.logit_quant_scale,
            out,
            row_max,
            row_sum,
        )
        ctx.visibility, ctx.options, ctx.stats = visibility, options, stats
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        lse = row_max * math.log(2) + row_sum.log()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fp8_attention has first derivatives only; its backward was called with create_graph=True"
            )
        *saved, out, row_max, row_sum = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grads = reference.backward(
                grad_out, out, row_max, row_sum, reference.Operands(*saved), ctx.visibility, ctx.options, ctx.stats
            )
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), *[None] * 8


def _reference(
    query, key, value, packed, scales, rotary, interleaved, qk_norm, visibility, softmax_scale, softcap, incoherent, precision,
    dropout_p, dropout_seed, statistics, return_lse,
):  # fmt: skip
    if dropout_p and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), device="cpu")
    options = reference.Options(softmax_scale, incoherent, dropout_p, int(dropout_seed or 0), softcap)
    statistics = statistics or AttentionStatistics()
    statistics.kernels = PLAIN
    query, key = normalise_and_rotate(query, key, qk_norm, rotary, interleaved)
    return _ReferenceAttention.apply(query, key, value, *scales, visibility, options, precision, statistics)


def _fused(
    query, key, value, packed, scales, rotary, interleaved, qk_norm, visibility, softmax_scale, softcap, incoherent, precision,
    dropout_p, dropout_seed, statistics, return_lse,
):  # fmt: skip
    device = query.device
    if not dropout_p:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), device=device)
    elif isinstance(dropout_seed, Tensor):
        dropout_seed = dropout_seed.to(device=device, dtype=torch.int64)
    else:  # the same 64 bits, signed
        dropout_seed = torch.full((), (dropout_seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    key_range = visibility.key_range
    if key_range is not None:
        key_range = key_range.to(device).clamp(0, key.shape[2]).to(torch.int32).contiguous()
    observe = statistics is not None and statistics.observe_logits
    gradient_counter = statistics.gradient_counter(device) if observe else None
    operands = [kernel_operand(x, "triton") for x in (query, key, value)]
    scales = [None if x is None else _array(x, device) for x in scales]
    cos = sin = None
    if rotary is not None:
        cos, sin = rotary
        if cos.stride(-1) != 1 or cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
    norm = () if qk_norm is None else (qk_norm[0].contiguous(), qk_norm[1].contiguous(), qk_norm[2])
    batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    buffer = None
    if statistics is not None:
        sections = length_of(batch, heads, kv_heads, True, observe or scales[3] is not None)
        buffer = statistics.buffer(sections, device)
    out, shift, row_sum, *_, counted = fused.attend(
        packed, buffer, *operands, *scales[:3], key_range, dropout_seed, gradient_counter, scales[3], cos, sin,
        interleaved, softmax_scale, softcap or 0.0, visibility.causal, visibility.window or 0, dropout_p, incoherent,
        precision == "high", statistics is not None, observe, *norm,
    )  # fmt: skip
    if statistics is not None:
        call = (
            device,
            query.shape[3],
            precision == "high",
            dropout_p > 0,
            softcap is not None,
            observe,
            scales[3] is not None,
        )
        statistics.add_casts(counted, (heads, kv_heads, kv_heads), call)
        if observe or scales[3] is not None:
            logit_max = counters_of(counted, batch, heads, kv_heads, True, True).logit_max[:heads]
        if scales[3] is not None:
            largest = logit_max if softcap is None else softcap * (logit_max / softcap).tanh()
            statistics.add_range("logit", largest * scales[3] / E4M3.max)
        if observe:
            statistics.add_logits(logit_max)
    return out if out.dtype == query.dtype else out.to(query.dtype), fused.lse(shift, row_sum) if return_lse else None


def _array(x: Tensor, device: torch.device) -> Tensor:
    """A scale as kernels read it, contiguous on their device."""
    return (x if x.device == device else x.to(device)).contiguous()


def kernel_operand(x: Tensor, backend: str) -> Tensor:
    """x as the backend reads it before it quantises: the fused kernels take float32 as bfloat16."""
    return x.bfloat16() if x.dtype == torch.float32 and resolve_backend(backend, x.device) == "triton" else x


def fp8_attention(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (B, Hkv, Lk, D)
    value: Tensor,  # (B, Hkv, Lk, D)
    *,
    q_quant_scale: Tensor,  # (Hq,)
    k_quant_scale: Tensor,  # (Hkv,)
    v_quant_scale: Tensor,  # (Hkv,)
    packed: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,  # (B, L, (Hq + 2·Hkv)·D), or (B, L, H·D) each
    rotary: tuple[Tensor, Tensor] | None = None,  # (B or 1, L, R/2) each
    rotary_interleaved: bool = False,
    qk_norm: QKNorm | None = None,  # (D,), (D,), epsilon
    softmax_scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
    key_range: Tensor | None = None,  # (B, Lq, 2)
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    incoherent: bool = True,
    precision: str = "standard",
    logit_quant_scale: Tensor | None = None,  # (Hq,)
    backend: str = "auto",
    return_lse: bool = False,
    statistics: AttentionStatistics | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with E4M3 operands, differentiable with E4M3 gradients; data flow in `kernels/reference.py`.

    Args:
        query, key, value: float32, bfloat16 or float16, any strides. Hq is a multiple of Hkv. "triton" rounds float32 to
            bfloat16 first.
        q_quant_scale, k_quant_scale, v_quant_scale: float32 factors real → FP8 per head. 448/quant_scale must bound the
            entries: of v as given, of q and k after norm, RoPE and the Hadamard mix (their 2-norm does). Any strides; no gradient
            reaches them.
        packed: the tensor that query, key and value are consecutive views of, as one fused projection gives it. "triton" then
            gives it one gradient, without the concatenation that undoes a split. Or the three tensors, as three projections give
            them. None, the default, gives a gradient to each of query, key and value.
        rotary: (cos, sin) of rotary position embeddings that query and key have not had yet, for their first R ≤ D channels;
            the kernels turn q and k as they load them, and their gradients back, in float32. Needs Lq = Lk; without gradient.
            None, the default: RoPE was applied, or there is none.
        rotary_interleaved: pairs are channels (2d, 2d + 1), as in GPT-J; by default (d, d + R/2), as in Llama.
        qk_norm: (weight of q, weight of k, ε) of RMS norms over D that query and key have not had yet and get before RoPE, as
            `kernels.qk_norm.rms_norm`; the weights get gradients, and "triton" keeps query and key as given for the backward
            (float32 as bfloat16). None, the default: they were normalised, or there is no norm.
        softmax_scale: factor on q·k; default D^-½.
        softcap: logits S = q·k·softmax_scale become softcap·tanh(S/softcap) before the mask (Gemma 2), from 2⁻²⁰ to 2²⁰; None, the
            default, leaves them alone.
        causal: row i sees keys up to i + Lk − Lq.
        window: with causal, a row sees at most this many keys, itself included.
        key_range: further restricts row i of sequence b to keys start ≤ j < stop (integers); an empty row gives 0.
        dropout_p: probability, in [0, 1), that an attention probability is dropped; survivors are divided by 1 − dropout_p.
        dropout_seed: 64-bit Philox seed, or an int64 tensor () that holds one; None draws one from torch's generator (the
            device's own with "triton", so that no call waits and CUDA graphs draw anew; the CPU's with "reference").
        incoherent: mix q and k by an orthonormal Hadamard matrix first (halves their quantisation error).
        precision: "standard", or "high" for k as two FP8 terms.
        logit_quant_scale: also round the logits, as they enter the softmax, to E4M3, times this float32 factor per query head;
            those beyond ±448 saturate, and are counted. The gradient passes straight through. None, the default, does not.
        backend: "triton", the fused kernels; "reference", plain PyTorch; "auto", the first on GPUs that can run it.
        return_lse: also return the natural log-sum-exp of each row's logits, (B, Hq, Lq) float32, without gradient; −inf where
            a row sees no key.
        statistics: accumulates overflow counts and the range in use, in place. "triton" counts the casts of q, k and v; those of
            the logit gradients, whose bound holds by Cauchy–Schwarz, only with `observe_logits`.
    Returns:
        (B, Hq, Lq, D) in query's dtype, or that and the log-sum-exp; first derivatives only.
    Raises:
        RuntimeError: backend="triton" where it cannot run.
        ValueError: a shape, head dimension, device, window, soft cap, epsilon, probability or precision that is not as stated, or
            an empty batch or sequence.
        TypeError: an operand, a norm's weight, cos or sin that is not floating point, or a key_range that holds no integers.
    """
    check_operands(query, key, value)
    scales = (q_quant_scale, k_quant_scale, v_quant_scale, logit_quant_scale)
    check_scales(scales, query.shape[1], key.shape[1])
    if packed is not None:
        check_packed(packed, query, key, value)
    if rotary is not None:
        check_rotary(rotary, query, key)
    if qk_norm is not None:
        check_qk_norm(qk_norm, query)
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window must be at least 1 and needs causal=True, got window={window}, causal={causal}")
    if key_range is not None and key_range.shape != (query.shape[0], query.shape[2], 2):
        raise ValueError(
            f"key_range must be (B, Lq, 2) = {(query.shape[0], query.shape[2], 2)}, got {tuple(key_range.shape)}"
        )
    if key_range is not None and (key_range.is_floating_point() or key_range.dtype == torch.bool):
        raise TypeError(f"key_range must hold integers, got {key_range.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if precision not in ("standard", "high"):
        raise ValueError(f'precision must be "standard" or "high", got {precision!r}')
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    if softcap is not None and not SOFTCAP_MIN <= softcap <= SOFTCAP_MAX:
        raise ValueError(f"softcap must lie in [2⁻²⁰, 2²⁰], or be None for no soft cap, got {softcap}")
    visibility = Visibility(query.shape[2], key.shape[2], causal, window, key_range)
    attend = _fused if resolve_backend(backend, query.device) == "triton" else _reference
    out, lse = attend(
        query, key, value, packed, scales, rotary, rotary_interleaved, qk_norm, visibility, softmax_scale, softcap, incoherent,
        precision, dropout_p, dropout_seed, statistics, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
