"""Other attention implementations on one GPU, behind one interface, for the speed benchmark.

All take BF16 q (B, Hq, L, D), k, v (B, Hkv, L, D) and grad (B, Hq, L, D), transposed views of (B, L, H, D) memory. `forward` and
`backward` run the attention kernels alone, on operands already in the kernel's format; `whole_forward` and `whole_both` go from
BF16 operands to BF16 results, quantisation included; `result` returns O, dQ, dK, dV for a correctness check.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

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

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        self.leaves, self.shape = (q, k, v), shape
        self.operands, self.grad = tuple(x.detach() for x in (q, k, v)), grad.detach()

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


@cache
def cudnn_handle() -> Any:
    """One cuDNN handle for the process."""
    return require("cudnn", "nvidia-cudnn-frontend").create_handle()


class CudnnGraph:
    """One cuDNN operation, built once: its operands by name, their buffers and the workspace."""

    def __init__(self, operation: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], options: dict[str, Any]):
        cudnn, self.handle = require("cudnn", "nvidia-cudnn-frontend"), cudnn_handle()
        cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        types = {E4M3: cudnn.data_type.FP8_E4M3, torch.float32: cudnn.data_type.FLOAT}
        try:
            self.graph = cudnn.pygraph(
                io_data_type=cudnn.data_type.FP8_E4M3,
                intermediate_data_type=cudnn.data_type.FLOAT,
                compute_data_type=cudnn.data_type.FLOAT,
                handle=self.handle,
            )
            self.keys = {
                name: self.graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype], name=name)
                for name, x in inputs.items()
            }
            mask = {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT}
            results = getattr(self.graph, operation)(**self.keys, **mask, **options)
            for key, (name, x) in zip(results, outputs.items(), strict=True):
                key.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride())).set_data_type(types[x.dtype])
                self.keys[name] = key
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
        except Exception as error:  # the frontend's own exceptions share no base class
            raise RuntimeError(f"cuDNN {operation}: {error}") from error
        self.buffers = {**inputs, **outputs}
        self.workspace = torch.empty(max(self.graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")

    def __call__(self, **replaced: Tensor) -> None:
        """Run on the buffers, some replaced for this call."""
        buffers = {**self.buffers, **replaced}
        self.graph.execute({key: buffers[name] for name, key in self.keys.items()}, self.workspace, handle=self.handle)


class CudnnFp8(Rival):
    """cuDNN's FP8 attention: per-tensor E4M3 operands and results; O, dP, dQ, dK, dV scales from a calibration run."""

    name = "cuDNN FP8"
    backward_error: str | None = None

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        super().__init__(q, k, v, grad, shape)
        require("cudnn", "nvidia-cudnn-frontend")
        self.scalars: dict[str, Tensor] = {}  # each (1, 1, 1, 1) float32
        self._scalar("scale_s").fill_(E4M3_MAX)  # probabilities are at most 1
        self._scalar("descale_s").fill_(1 / E4M3_MAX)
        quantised = self._quantise(zip("qkv", self.operands, strict=True))
        options: dict[str, Any] = {"attn_scale": shape.dim**-0.5}
        options |= {"right_bound": 0} if shape.causal else {}
        options |= {"left_bound": shape.window} if shape.window else {}

        self.out = torch.empty_like(quantised["q"])  # (B, Hq, L, D), like every buffer below a view of (B, L, H, D)
        self.stats = torch.empty(shape.batch, shape.heads, shape.length, 1, device=q.device)
        scales = ("descale_s", "scale_s", "scale_o")
        outputs = {"o": self.out, "stats": self.stats, **self._scalars("amax_s", "amax_o")}
        inputs = {**quantised, **self._scalars(*scales)}
        self.run_forward = CudnnGraph("sdpa_fp8", inputs, outputs, {**options, "generate_stats": True})
        self._calibrate(self.run_forward, ["o"], rounds=1)

        quantised |= self._quantise([("dO", self.grad)])
        self.gradients = {f"d{name.upper()}": torch.empty_like(quantised[name]) for name in "qkv"}
        scales = ("descale_o", "descale_s", "descale_dP", "scale_s", "scale_dQ", "scale_dK", "scale_dV", "scale_dP")
        amaxes = self._scalars("amax_dQ", "amax_dK", "amax_dV", "amax_dP")
        inputs = {**quantised, "o": self.out, "stats": self.stats, **self._scalars(*scales)}
        try:
            self.run_backward = CudnnGraph("sdpa_fp8_backward", inputs, {**self.gradients, **amaxes}, options)
        except RuntimeError as error:  # on Hopper, any head dimension but 128
            self.backward_error = str(error)
        else:
            self._calibrate(self.run_backward, ["dP", "dQ", "dK", "dV"], rounds=2)  # dQ and dK depend on dP's scale
            self.has_backward = True

    def _scalar(self, name: str) -> Tensor:
        return self.scalars.setdefault(name, torch.ones(1, 1, 1, 1, device=self.grad.device))

    def _scalars(self, *names: str) -> dict[str, Tensor]:
        return {name: self._scalar(name) for name in names}

    def _quantise(self, operands: Any) -> dict[str, Tensor]:
        """E4M3 operands by name, with their descales, as a graph takes them."""
        inputs = {}
        for name, x in operands:
            inputs[name], descale = quantise(x)
            inputs[f"descale_{name}"] = descale.view(1, 1, 1, 1)
        return inputs

    def _calibrate(self, run: CudnnGraph, names: list[str], rounds: int) -> None:
        """Set the scales of a graph's results from their largest magnitudes, then run with them."""
        for _ in range(rounds):
            for name in names:
                self._scalar(f"amax_{name}").zero_()
            run()
            for name in names:
                descale = self._scalar(f"amax_{name}").clamp(min=1e-30) / E4M3_MAX
                self._scalar(f"descale_{name}").copy_(descale)
                self._scalar(f"scale_{name}").copy_(1 / descale)
        run()

    def forward(self) -> Tensor:
        """Quantised O; `result` has it in real units."""
        self.run_forward()
        return self.out

    def backward(self) -> tuple[Tensor, ...] | None:
        """Quantised dQ, dK, dV; `result` has them in real units."""
        if not self.has_backward:
            return None
        self.run_backward()
        return tuple(self.gradients.values())

    def _whole_forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        quantised = self._quantise(zip("qkv", self.operands, strict=True))
        self.run_forward(**quantised)
        return dequantise(self.out, self.scalars["descale_o"]), quantised

    def whole_forward(self) -> Tensor:
        return self._whole_forward()[0]

    def whole_both(self) -> tuple[Tensor, ...] | None:
        if not self.has_backward:
            return None
        out, quantised = self._whole_forward()
        self.run_backward(**quantised, **self._quantise([("dO", self.grad)]))
        return out, *(dequantise(x, self.scalars[f"descale_{name}"]) for name, x in self.gradients.items())

    def result(self) -> Results:
        out = self.forward().float() * self.scalars["descale_o"]
        if self.backward() is None:
            return out, None, None, None
        return out, *(x.float() * self.scalars[f"descale_{name}"] for name, x in self.gradients.items())


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


RIVALS: dict[str, Callable[..., Rival]] = {
    SdpaCudnn.name: SdpaCudnn,
    SdpaFlash.name: SdpaFlash,
    CudnnFp8.name: CudnnFp8,
    "FlashAttention-3 BF16": Fa3,
    "FlashAttention-3 FP8": partial(Fa3, fp8=True),
}
