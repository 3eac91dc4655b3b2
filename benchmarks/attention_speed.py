"""Speed of the fused kernels against other attention on one GPU, behind a correctness gate.

    python benchmarks/attention_speed.py --output docs/attention_speed          # writes .jsonl, .md and .png

Every implementation runs in this process on the same BF16 tensors. Two bases, medians of CUDA-event times (p20 and p80 in the
JSON): "kernel", operands already in the kernel's own format; "whole", from BF16 q, k, v, dO to BF16 O, dQ, dK, dV, quantisation
included. TFLOP/s count 2 products forward and 5 backward, of visible logits only. What goes through autograd, as users call it, has
the second basis only. Each implementation's O, dQ, dK, dV are first compared with exact attention (`speed_gate`); one that is wrong
is not timed, and the page says so. Records are written model by model; a run that was cut off continues when called again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import cudnn_fp8
import torch
import triton
from cudnn_fp8 import CudnnFp8, CudnnFp8IdleWindow
from host import environment
from records import read
from rivals import Fa3, Results, Rival, SdpaCudnn, SdpaFlash, Shape
from speed_gate import correct, draw, quant_scale
from speed_report import plot, to_markdown
from te_attention import TransformerEngineFp8
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, fused, hopper, launch, replay

TOKENS = 16384
LENGTHS = (1024, 4096, 16384, 32768)
MODELS = {  # query heads, key/value heads, head dimension, window
    "Llama-3-8B": (32, 8, 128, None),
    "Llama-3.2-1B": (32, 8, 64, None),
    "GPT-2 XL": (25, 25, 64, None),
    "Mistral, window 4096": (32, 8, 128, 4096),
}


class Ours:
    """The fused kernels; `high` is precision="high"."""

    has_backward = has_kernels = True

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape, high: bool = False):
        self.operands, self.grad = (q.detach(), k.detach(), v.detach()), grad
        self.scales = tuple(quant_scale(x) for x in self.operands)
        absent = ("key_range", "dropout_seed", "gradient_overflow", "logit_quant_scale", "cos", "sin")
        self.options = dict.fromkeys(absent) | {
            "interleaved": False,
            "softmax_scale": shape.dim**-0.5,
            "softcap": 0.0,
            "causal": shape.causal,
            "window": shape.window or 0,
            "dropout_p": 0.0,
            "incoherent": True,
        }
        self.high = high
        self.kernels = {}
        self.whole_both()

    def tune(self) -> dict[str, int]:
        return {}

    def whole_forward(self) -> Tensor:
        counters = {"count": False, "observe": False}
        self.saved = fused.attention_forward(*self.operands, *self.scales, **self.options, high=self.high, **counters)
        return self.saved[0]

    def whole_backward(self) -> tuple[Tensor, ...]:
        dtypes = dict.fromkeys(("q_dtype", "k_dtype", "v_dtype"), torch.bfloat16)
        saved = self.saved[:8]
        *grads, _ = fused.attention_backward(self.grad, *saved, *self.scales, **self.options, packed=False, **dtypes)
        return tuple(grads)

    def whole_both(self) -> tuple[Tensor, ...]:
        return self.whole_forward(), *self.whole_backward()

    def _record(self) -> None:
        """Keep the launches of the attention kernels, so that they can be repeated without the quantising ones."""
        names = ("forward", "query_gradient", "key_gradient", "gradients")
        places = [(module, name) for module in (launch, hopper.launch) for name in names if hasattr(module, name)]
        originals = {place: getattr(*place) for place in places}

        def recorded(name, original):
            def run(*args):
                self.kernels[name] = lambda: original(*args)
                original(*args)

            return run

        replay.forget()
        try:
            for (module, name), original in originals.items():
                setattr(module, name, recorded(name, original))
            self.whole_both()
        finally:
            replay.forget()
            for (module, name), original in originals.items():
                setattr(module, name, original)

    def forward(self) -> None:
        if not self.kernels:
            self._record()
        self.kernels["forward"]()

    def backward(self) -> None:
        if not self.kernels:
            self._record()
        for name, run in self.kernels.items():
            if name != "forward":
                run()

    def result(self) -> tuple[Tensor, ...]:
        return self.whole_both()


class OursAutograd(Rival):
    """`fp8_attention` with its counters on, under autograd: what a patched layer calls."""

    name = "hf_geoscale FP8, autograd"
    has_backward, has_kernels = True, False

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape):
        super().__init__(q, k, v, grad, shape)
        scales = {f"{name}_quant_scale": quant_scale(x) for name, x in zip("qkv", self.operands, strict=True)}
        self.options = scales | {"causal": shape.causal, "window": shape.window, "backend": "triton"}
        self.statistics = AttentionStatistics()

    def whole_forward(self) -> Tensor:
        return fp8_attention(*self.leaves, **self.options, statistics=self.statistics)

    def whole_both(self) -> tuple[Tensor, ...]:
        out = self.whole_forward()
        return out, *torch.autograd.grad(out, self.leaves, self.grad)

    def result(self) -> Results:
        out, *gradients = self.whole_both()
        if overflows := self.statistics.overflows:
            raise RuntimeError(f"{overflows} overflows under scales that allow none")
        return out.detach(), *gradients


CONTENDERS: dict[str, Callable[..., Ours | Rival]] = {
    "hf_geoscale FP8": Ours,
    OursAutograd.name: OursAutograd,
    "hf_geoscale FP8, high": partial(Ours, high=True),
    SdpaCudnn.name: SdpaCudnn,
    SdpaFlash.name: SdpaFlash,
    CudnnFp8.name: CudnnFp8,
    CudnnFp8IdleWindow.name: CudnnFp8IdleWindow,
    TransformerEngineFp8.name: TransformerEngineFp8,
    "FlashAttention-3 BF16": Fa3,
    "FlashAttention-3 FP8": partial(Fa3, fp8=True),
}


def visible_logits(shape: Shape) -> float:
    length, window = shape.length, min(shape.window or shape.length, shape.length)
    return window * (window + 1) / 2 + (length - window) * window


def milliseconds(call) -> list[float]:
    """p20, p50, p80 over about a seventh of a second."""
    return triton.testing.do_bench(call, warmup=30, rep=150, quantiles=[0.2, 0.5, 0.8])


def time_one(make, shape: Shape) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Times by basis, and how many plans were tried by pass."""
    contender = make(*draw(shape), shape)
    tried = contender.tune()
    times = {"whole forward": milliseconds(contender.whole_forward)}
    if contender.has_backward:
        times["whole both"] = milliseconds(contender.whole_both)
    if contender.has_kernels:
        times["kernel forward"] = milliseconds(contender.forward)
        if contender.has_backward:
            times["kernel backward"] = milliseconds(contender.backward)
    return times, tried


def measure(model: str, lengths: list[int]) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """Rows of times of a model, why an implementation has none, and what is wrong with some that have."""
    rows: list[dict] = []
    heads, kv_heads, dim, window = MODELS[model]
    print(model, flush=True)
    allowed, not_timed, faults = correct(Shape(1, 0, heads, kv_heads, dim, window), CONTENDERS)
    for length in lengths:
        shape = Shape(max(TOKENS // length, 1), length, heads, kv_heads, dim, window)
        flops = 4 * shape.batch * heads * visible_logits(shape) * dim
        for name, errors in allowed.items():
            try:
                times, tried = time_one(CONTENDERS[name], shape)
            except (NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
                print(f"{model} L{length}: {name}: {(str(error).splitlines() or [''])[0][:120]}", flush=True)
                continue
            row = {"model": model, **asdict(shape), "name": name, "forward_flops": flops, "ms": times}
            rows.append(row | {"gate_errors": errors} | ({"plans_tried": tried} if tried else {}))
            print(f"{model} L{length}: {name}: { {k: round(v[1], 3) for k, v in times.items()} }", flush=True)
            torch.cuda.empty_cache()
    return rows, not_timed, faults


def run(arguments: argparse.Namespace) -> list[dict]:
    """Records of each model: a header with what it ran on, then its rows.

    A model that the output has from the same commit and GPU is skipped; one from elsewhere is replaced once it is measured.
    """
    host = environment("transformer_engine", "nvidia-cudnn-frontend")
    path = arguments.output.with_suffix(".jsonl") if arguments.output else None
    records = read(path) if path and path.exists() else []
    for model in arguments.models:
        before = next((r["environment"] for r in records if r["model"] == model and "environment" in r), None)
        if before is not None and all(before[key] == host[key] for key in ("gpu", "commit")):
            continue
        rows, not_timed, faults = measure(model, arguments.lengths)
        records = [r for r in records if r["model"] != model]
        records += [{"model": model, "environment": host, "not_timed": not_timed, "faults": faults}, *rows]
        if path:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument(
        "--plans", type=int, default=cudnn_fp8.PLANS, help="cuDNN FP8 execution plans tried; default %(default)s"
    )
    parser.add_argument("--output", type=Path, help="path without suffix for .jsonl, .md and .png; default: print only")
    parser.add_argument("--render", type=Path, help="make table and plot from an earlier .jsonl instead of measuring")
    arguments = parser.parse_args(argv)
    if arguments.render:
        records = read(arguments.render)
    else:
        cudnn_fp8.PLANS = arguments.plans
        records = run(arguments)
    table = to_markdown(records)
    print(table)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(table)
        plot(records, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
