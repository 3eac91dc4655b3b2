"""Other attention implementations on one GPU, behind one interface, for the speed benchmark.

All take BF16 q (B, Hq, L, D), k, v (B, Hkv, L, D) and grad (B, Hq, L, D), transposed views of (B, L, H, D) memory. `forward` and
`backward` run the attention kernels alone, on operands already in the kernel's format; `whole_forward` and `whole_both` go from
BF16 operands to BF16 results, quantisation included; `result` returns O, dQ, dK, dV for a correctness check.
"""

import importlib
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Shape:
    """One attention problem; query i sees keys j ≤ i (causal) with i - j < window."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    causal: bool = True


def require(module: str, package: str) -> ModuleType:
    """Import a module, or say which package brings it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ImportError(f"needs the package {package}: {error}") from error


def flat(x: Tensor) -> Tensor:
    """(B, H, L, D) view of (B, L, H, D) memory → (B·L·H·D,), no copy."""
    return x.transpose(1, 2).view(-1)


def heads_second(x: Tensor, like: Tensor) -> Tensor:
    """(B·L·H·D,) → (B, H, L, D) with `like`'s shape, no copy."""
    batch, heads, length, dim = like.shape
    return x.view(batch, length, heads, dim).transpose(1, 2)


@partial(torch.compile, dynamic=True)
def quantise_flat(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-tensor E4M3 with current scaling: values (N,) and the descale ()."""
    descale = x.abs().amax().float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / descale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), descale


@partial(torch.compile, dynamic=True)
def dequantise_flat(x: Tensor, descale: Tensor) -> Tensor:
    """E4M3 (N,) and its descale (1,) → BF16 (N,)."""
    return (x.float() * descale).bfloat16()


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 (B, H, L, D) → E4M3 in the same layout and the descale ()."""
    values, descale = quantise_flat(flat(x))
    return heads_second(values, x), descale


def dequantise(x: Tensor, descale: Tensor) -> Tensor:
    """E4M3 (B, H, L, D) and its descale (1, 1, 1, 1) → BF16 in the same layout."""
    return heads_second(dequantise_flat(flat(x), descale.view(1)), x)


class Rival:
    """The common interface; a rival without a backward leaves `has_backward` False."""

    name: str
    has_backward = False
    has_kernels = True  # `forward` and `backward` run the kernels alone

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        self.leaves, self.shape = (q, k, v), shape
        self.operands, self.grad = tuple(x.detach() for x in (q, k, v)), grad.detach()

    def tune(self) -> dict[str, int]:
        """Before timing, after the gate: choose among plans; how many were tried, by pass."""
        return {}

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> tuple[Tensor, ...] | None:
        return None

    def whole_forward(self) -> Tensor:
        return self.forward()

    def whole_both(self) -> tuple[Tensor, ...] | None:
        return None

    def result(self) -> Results:
        raise NotImplementedError


class Sdpa(Rival):
    """torch's scaled_dot_product_attention with one backend; there is nothing to quantise, so both bases are the same."""

    has_backward = True
    backend: SDPBackend

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        if shape.window:
            raise NotImplementedError(f"{self.name} has no window")
        super().__init__(q, k, v, grad, shape)
        self.out: Tensor | None = None

    def forward(self) -> Tensor:
        with sdpa_kernel(self.backend):
            grouped = self.shape.heads != self.shape.kv_heads
            self.out = F.scaled_dot_product_attention(*self.leaves, is_causal=self.shape.causal, enable_gqa=grouped)
        return self.out

    def backward(self) -> tuple[Tensor, ...]:
        out = self.forward() if self.out is None else self.out
        return torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True)

    def whole_both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return out, *torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True)

    def result(self) -> Results:
        out, *gradients = self.whole_both()
        return out.detach().float(), *(x.float() for x in gradients)


class SdpaCudnn(Sdpa):
    name = "SDPA cuDNN BF16"
    backend = SDPBackend.CUDNN_ATTENTION


class SdpaFlash(Sdpa):
    name = "SDPA FlashAttention-2 BF16"
    backend = SDPBackend.FLASH_ATTENTION


class Fa3(Rival):
    """FlashAttention-3, forward only, in BF16 or per-tensor E4M3."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape, fp8: bool = False):
        super().__init__(q, k, v, grad, shape)
        self.name, self.fp8 = f"FlashAttention-3 {'FP8' if fp8 else 'BF16'}", fp8
        self.attention = require("fa3_fwd_interface", "fa3-fwd").flash_attn_func
        self.window = (shape.window - 1, 0) if shape.window else (-1, -1)
        self.prepared = self._prepare()

    def _prepare(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """q, k, v (B, L, H, D) in the kernel's format, with descales (B, Hkv)."""
        if not self.fp8:
            return [x.transpose(1, 2) for x in self.operands], {}
        quantised = [quantise(x) for x in self.operands]
        size = (self.shape.batch, self.shape.kv_heads)
        descales = {f"{name}_descale": d.expand(size) for name, (_, d) in zip("qkv", quantised, strict=True)}
        return [x.transpose(1, 2) for x, _ in quantised], descales

    def _run(self, operands: list[Tensor], descales: dict[str, Tensor]) -> Tensor:
        return self.attention(*operands, causal=self.shape.causal, window_size=self.window, **descales)

    def forward(self) -> Tensor:
        return self._run(*self.prepared).transpose(1, 2)

    def whole_forward(self) -> Tensor:
        return self._run(*self._prepare()).transpose(1, 2)

    def result(self) -> Results:
        return self.forward().float(), None, None, None
