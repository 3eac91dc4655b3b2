"""Speed of the fused kernels against other attention on one GPU, behind a correctness gate.

    python benchmarks/attention_speed.py --output docs/attention_speed          # writes .jsonl, .md and .png

Every implementation runs in this process on the same BF16 tensors. Two bases, medians of CUDA-event times (p20 and p80 in the
JSON): "kernel", operands already in the kernel's own format; "whole", from BF16 q, k, v, dO to BF16 O, dQ, dK, dV, quantisation
included. TFLOP/s count 2 products forward and 5 backward, of visible logits only. Each implementation's O, dQ, dK, dV are first
compared with exact attention on a short input of the same shape; one that fails is not timed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from cudnn_fp8 import CudnnFp8, CudnnFp8IdleWindow
from host import environment
from rivals import Fa3, Rival, SdpaCudnn, SdpaFlash, Shape
from speed_report import plot, to_markdown
from torch import Tensor

from hf_geoscale.kernels import fused, hopper, launch
from hf_geoscale.scaling import E4M3

TOKENS = 16384
LENGTHS = (1024, 4096, 16384, 32768)
MODELS = {  # query heads, key/value heads, head dimension, window
    "Llama-3-8B": (32, 8, 128, None),
    "Llama-3.2-1B": (32, 8, 64, None),
    "GPT-2 XL": (25, 25, 64, None),
    "Mistral, window 4096": (32, 8, 128, 4096),
}
GATE_LENGTH = 512
GATE = {"BF16": 0.02, "FP8": 0.2}
"""Largest relative error of O, dQ, dK, dV on the gate's input; docs/gradient_error.md has up to .009 for BF16, .12 for FP8."""


def quant_scale(x: Tensor) -> Tensor:
    """Per-head factor from 1.5 × the largest row norm, as a certificate leaves it: (H,)."""
    return E4M3.max / (1.5 * x.detach().float().norm(dim=-1).amax((0, 2)))


class Ours:
    """The fused kernels; `high` is precision="high"."""

    has_backward = True

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape, high: bool = False):
        self.operands, self.grad = (q.detach(), k.detach(), v.detach()), grad
        self.scales = tuple(quant_scale(x) for x in self.operands)
        self.options = (shape.dim**-0.5, 0.0, shape.causal, shape.window or 0, 0.0, True)
        self.high = high
        self.kernels = {}
        self.whole_both()

    def whole_forward(self) -> Tensor:
        nothing = (None, None, None, None)
        self.saved = fused.attention_forward(
            *self.operands, *self.scales, *nothing, *self.options, self.high, False, False
        )
        return self.saved[0]

    def whole_backward(self) -> tuple[Tensor, ...]:
        dtypes = (torch.bfloat16,) * 3
        return fused.attention_backward(
            self.grad, *self.saved[:8], *self.scales, None, None, None, None, *self.options, *dtypes
        )

    def whole_both(self) -> tuple[Tensor, ...]:
        return self.whole_forward(), *self.whole_backward()

    def _record(self) -> None:
        """Keep the launches of the three attention kernels, so that they can be repeated without the quantising ones."""
        names = ("forward", "query_gradient", "key_gradient")
        modules = [module for module in (launch, hopper.launch) if module]
        originals = {(module, name): getattr(module, name) for module in modules for name in names}

        def recorded(name, original):
            def run(*args):
                self.kernels[name] = lambda: original(*args)
                original(*args)

            return run

        try:
            for (module, name), original in originals.items():
                setattr(module, name, recorded(name, original))
            self.whole_both()
        finally:
            for (module, name), original in originals.items():
                setattr(module, name, original)

    def forward(self) -> None:
        if not self.kernels:
            self._record()
        self.kernels["forward"]()

    def backward(self) -> None:
        if not self.kernels:
            self._record()
        self.kernels["query_gradient"]()
        self.kernels["key_gradient"]()

    def result(self) -> tuple[Tensor, ...]:
        return self.whole_both()


CONTENDERS: dict[str, Callable[..., Ours | Rival]] = {
    "hf_geoscale FP8": Ours,
    "hf_geoscale FP8, high": partial(Ours, high=True),
    SdpaCudnn.name: SdpaCudnn,
    SdpaFlash.name: SdpaFlash,
    CudnnFp8.name: CudnnFp8,
    CudnnFp8IdleWindow.name: CudnnFp8IdleWindow,
    "FlashAttention-3 BF16": Fa3,
    "FlashAttention-3 FP8": partial(Fa3, fp8=True),
}


def draw(shape: Shape, seed: int = 0) -> list[Tensor]:
    """q, k, v, dO: standard normal BF16, views of (B, L, H, D) memory."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    tensors = [
        torch.randn(shape.batch, shape.length, h, shape.dim, generator=generator, device="cuda")
        .bfloat16()
        .transpose(1, 2)
        for h in heads
    ]
    return [x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape) -> list[Tensor]:
    """O, dQ, dK, dV in float32 from dense attention."""
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    rows = torch.arange(shape.length, device="cuda")
    visible = rows[:, None] >= rows[None, :]
    if shape.window:
        visible &= rows[:, None] - rows[None, :] < shape.window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return [out, *torch.autograd.grad(out, (q, k, v), grad.float())]


def gate(name: str, make, shape: Shape) -> tuple[str | None, dict[str, float]]:
    """Why an implementation may not be timed on a shape, or None: it must be right on a short input of it; and its errors there."""
    short = Shape(1, GATE_LENGTH, shape.heads, shape.kv_heads, shape.dim, min(shape.window or 0, 200) or None)
    tensors = draw(short, seed=1)
    try:
        results = make(*tensors, short).result()
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", {}
    allowed = GATE["FP8" if "FP8" in name else "BF16"]
    errors: dict[str, float] = {}
    for label, mine, theirs in zip(("O", "dQ", "dK", "dV"), results, exact(*tensors, short), strict=True):
        if mine is None:
            continue
        errors[label] = float((mine.float() - theirs).norm() / theirs.norm())
        if not errors[label] < allowed:
            return f"wrong: {label} has relative error {errors[label]:.3f}, allowed {allowed}", errors
    return None, errors


def visible_logits(shape: Shape) -> float:
    length, window = shape.length, min(shape.window or shape.length, shape.length)
    return window * (window + 1) / 2 + (length - window) * window


def milliseconds(call) -> list[float]:
    """p20, p50, p80 over about a quarter of a second."""
    return triton.testing.do_bench(call, warmup=40, rep=200, quantiles=[0.2, 0.5, 0.8])


def time_one(make, shape: Shape) -> dict[str, list[float]]:
    contender = make(*draw(shape), shape)
    times = {"whole forward": milliseconds(contender.whole_forward), "kernel forward": milliseconds(contender.forward)}
    if contender.has_backward:
        times["whole both"] = milliseconds(contender.whole_both)
        times["kernel backward"] = milliseconds(contender.backward)
    return times


def measure(models: list[str], lengths: list[int]) -> list[dict]:
    rows = []
    for model in models:
        heads, kv_heads, dim, window = MODELS[model]
        allowed = {}
        for name, make in CONTENDERS.items():
            reason, errors = gate(name, make, Shape(1, GATE_LENGTH, heads, kv_heads, dim, window))
            print(f"{model}: {name}: {reason or 'correct'}", flush=True)
            if reason is None:
                allowed[name] = make, errors
        for length in lengths:
            shape = Shape(max(TOKENS // length, 1), length, heads, kv_heads, dim, window)
            flops = 4 * shape.batch * heads * visible_logits(shape) * dim
            for name, (make, errors) in allowed.items():
                try:
                    times = time_one(make, shape)
                except (NotImplementedError, RuntimeError) as error:
                    print(f"{model} L{length}: {name}: {str(error).splitlines()[0][:120]}", flush=True)
                    continue
                row = {"model": model, **asdict(shape), "name": name, "forward_flops": flops, "ms": times}
                rows.append(row | {"gate_errors": errors})
                print(f"{model} L{length}: {name}: { {k: round(v[1], 3) for k, v in times.items()} }", flush=True)
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--output", type=Path, help="path without suffix for .jsonl, .md and .png; default: print only")
    parser.add_argument("--render", type=Path, help="make table and plot from an earlier .jsonl instead of measuring")
    arguments = parser.parse_args()
    if arguments.render:
        host, *rows = [json.loads(line) for line in arguments.render.read_text().splitlines()]
    else:
        host, rows = environment(), measure(arguments.models, arguments.lengths)
    table = to_markdown(rows, host)
    print(table)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(table)
        arguments.output.with_suffix(".jsonl").write_text("".join(json.dumps(x) + "\n" for x in (host, *rows)))
        plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
