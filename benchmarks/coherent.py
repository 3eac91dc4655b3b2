"""Inputs of attention whose sums grow with the length, and exact attention in float64, linear in memory.

Standard-normal inputs hide what a short accumulator loses: their sums stay small. Here rows attend nearly evenly, and values and
gradients have a mean. Shapes: q and dO (B, Hq, L, D), k and v (B, Hkv, L, D), BF16 views of (B, L, H, D) memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLATTENED = 0.05
"""Factor on q that makes rows attend nearly evenly."""

DOMINANT = 30.0
"""Factor on the channel that outweighs the others."""

NAMES = ("O", "dQ", "dK", "dV")
BLOCK_ENTRIES = 2**27
"""Most float64 numbers of one block of rows: 1 GiB a tensor."""


def _uniform(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return FLATTENED * q, k, 1 + 0.3 * v, grad


def _with_mean(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _ = _uniform(q, k, v, grad)
    return q, k, v, 1 + 0.5 * grad


def _dominant_channel(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Channel 0 of all four has a mean and outweighs the others; in the logits its mean cancels, and its rounding stays."""
    q, k, v, grad = _with_mean(q, k, v, grad)
    weight = torch.ones(q.shape[-1], device=q.device)
    weight[0] = DOMINANT
    offset = weight.clone()
    offset[1:] = 0
    return q + FLATTENED * offset, k + offset, v * weight, grad * weight


def _biased_keys(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Each channel of k has a mean, as after a bias: dQ multiplies it by the sum of a row's dS, which is 0."""
    q, k, v, grad = _with_mean(q, k, v, grad)
    bias = torch.linspace(-2, 2, k.shape[-1], device=k.device)
    return q, bias + 0.5 * k, v, grad


CASES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "normal": lambda *tensors: tensors,
    "uniform": _uniform,
    "+mean": _with_mean,
    "dominant channel": _dominant_channel,
    "biased keys": _biased_keys,
}


def draw(
    case: str,
    length: int,
    dim: int,
    heads: int = 2,
    kv_heads: int = 1,
    batch: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """q, k, v, dO of a case of `CASES`; the first three want gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = [
        torch.randn(batch, length, h, dim, generator=generator, device=device)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    tensors = [x.bfloat16().transpose(1, 2).detach() for x in CASES[case](*normal)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]


def masked(form: str, length: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Options of `fp8_attention` for a form of `FORMS`."""
    return {"causal": True, **FORMS[form](length, device)}


def _window(length: int, device: str | torch.device) -> dict[str, Any]:
    return {"window": max(length // 4, 1)}


def _packed(length: int, device: str | torch.device) -> dict[str, Any]:
    """Documents of a half, a quarter, … of the sequence; the last one takes the rest."""
    rows = torch.arange(length, device=device)
    ends = torch.tensor(sorted({length - (length >> i) for i in range(1, 5)} | {length}), device=device)
    document = torch.searchsorted(ends, rows, right=True)
    stop = ends[document]
    start = torch.cat([ends.new_zeros(1), ends[:-1]])[document]
    return {"key_range": torch.stack([start, stop], -1)[None].int()}


def _padded(length: int, device: str | torch.device) -> dict[str, Any]:
    """An eighth of the sequence is padding, on the left: its rows see nothing."""
    key_range = torch.tensor([length // 8, length], device=device, dtype=torch.int32)
    return {"key_range": key_range.expand(1, length, 2).contiguous()}


FORMS: dict[str, Callable[..., dict[str, Any]]] = {
    "causal": lambda length, device: {},
    "window": _window,
    "packed": _packed,
    "padded": _padded,
}


def spans(
    length: int,
    device: str | torch.device,
    causal: bool = True,
    window: int | None = None,
    key_range: Tensor | None = None,  # (B, L, 2)
) -> Tensor:
    """First and one-past-last key of each row: (B or 1, L, 2) int64."""
    rows = torch.arange(length, device=device)
    last = rows + 1 if causal else torch.full_like(rows, length)
    first = torch.zeros_like(rows) if window is None else (rows + 1 - window).clamp_min(0)
    bounds = torch.stack([first, last], -1)[None]
    if key_range is None:
        return bounds
    given = key_range.long()
    return torch.stack([torch.maximum(bounds[..., 0], given[..., 0]), torch.minimum(bounds[..., 1], given[..., 1])], -1)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bounds: Tensor,  # (B or 1, L, 2), of `spans`
    softmax_scale: float | None = None,
    softcap: float | None = None,
    keep: Callable[[slice, slice], Tensor] | None = None,
    survival: float = 1.0,
) -> list[Tensor]:
    """O, dQ, dK, dV of dense attention in float64, by blocks of rows; a row that sees nothing gives 0.

    Args:
        keep: which probabilities of some rows and keys dropout leaves, (B, Hq, R, K) bool. The slice of keys starts at a
            multiple of 4.
        survival: probability to be left.
    """
    batch, heads, length, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    groups = (kv_heads, heads // kv_heads)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    q, grad = (x.detach().double().unflatten(1, groups) for x in (q, grad))  # (B, Hkv, G, L, D)
    k, v = (x.detach().double()[:, :, None] for x in (k, v))  # (B, Hkv, 1, L, D)
    out, dq = torch.zeros_like(q), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    rows_at_once = max(min(length, BLOCK_ENTRIES // (batch * heads * n_keys)), 1)
    for start in range(0, length, rows_at_once):
        rows = slice(start, min(start + rows_at_once, length))
        first, last = bounds[:, rows, :1], bounds[:, rows, 1:]
        low, high = int(first.amin()) // 4 * 4, int(last.amax())
        if low >= high:
            continue
        keys = slice(low, high)
        position = torch.arange(low, high, device=q.device)
        visible = ((position >= first) & (position < last))[:, None, None]  # (B or 1, 1, 1, R, K)
        logits = q[..., rows, :] @ k[..., keys, :].mT * scale
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        slope = 1.0 if softcap is None else 1 - (logits / softcap).square()
        p = logits.masked_fill_(~visible, -torch.inf).softmax(-1).nan_to_num_()
        left = 1.0 if keep is None else keep(rows, keys).unflatten(1, groups).double() / survival
        out[..., rows, :] = (p * left) @ v[..., keys, :]
        given = grad[..., rows, :]
        delta = (given * out[..., rows, :]).sum(-1, keepdim=True)
        dv[..., keys, :] += ((p * left).mT @ given).sum(2, keepdim=True)
        ds = (given @ v[..., keys, :].mT).mul_(left).sub_(delta).mul_(p).mul_(slope).mul_(scale)
        dq[..., rows, :] = ds @ k[..., keys, :]
        dk[..., keys, :] += (ds.mT @ q[..., rows, :]).sum(2, keepdim=True)
    return [out.flatten(1, 2), dq.flatten(1, 2), dk[:, :, 0], dv[:, :, 0]]


def relative(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖."""
    return float((x.detach().double() - truth).norm() / truth.norm())
