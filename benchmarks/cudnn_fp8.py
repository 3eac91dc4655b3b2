"""cuDNN's FP8 attention, forward and backward, as a rival in the speed benchmark (needs nvidia-cudnn-frontend)."""

from functools import cache
from typing import Any

import torch
import triton
from rivals import E4M3, E4M3_MAX, Results, Rival, Shape, dequantise, quantise, require
from torch import Tensor


@cache
def cudnn_handle() -> Any:
    """One cuDNN handle for the process."""
    return require("cudnn", "nvidia-cudnn-frontend").create_handle()


PLANS = 3
"""Execution plans that are built and timed per problem and pass, at most; each may cost a second of compilation."""

DISAGREE = 0.2
"""Relative difference of two plans' FP8 results: each may be off by about .1 (docs/gradient_error.md)."""


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
            self.plan = self._build(0)
        except Exception as error:  # the frontend's own exceptions share no base class
            raise RuntimeError(f"cuDNN {operation}: {error}") from error
        self.buffers, self.outputs = {**inputs, **outputs}, tuple(outputs)

    def _build(self, first: int) -> int:
        """Build the first plan from an index on that cuDNN can, make room for its workspace, and return its index."""
        for index in range(first, self.graph.get_execution_plan_count()):
            try:
                self.graph.build_plan_at_index(index)
            except Exception:  # a plan that the heuristics name but that does not exist for this problem
                continue
            size = self.graph.get_workspace_size_plan_at_index(index)
            self.workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
            return index
        raise RuntimeError("no plan could be built")

    def __call__(self, **replaced: Tensor) -> None:
        """Run on the buffers, some replaced for this call."""
        buffers = {**self.buffers, **replaced}
        pack = {key: buffers[name] for name, key in self.keys.items()}
        self.graph.execute_plan_at_index(pack, self.workspace, self.plan, self.handle)

    def _results(self) -> list[Tensor]:
        """FP8 results of a run, as the numbers they stand for up to a factor."""
        self()
        return [self.buffers[name].float() for name in self.outputs if self.buffers[name].dtype == E4M3]

    def tune(self) -> int:
        """Take the fastest of up to PLANS plans; how many were timed. Plans that disagree with the first are left out."""
        expected = self._results()
        found = [(triton.testing.do_bench(self, warmup=5, rep=20), self.plan, self.workspace)]
        while len(found) < PLANS:
            try:
                self.plan = self._build(self.plan + 1)
            except RuntimeError:
                break
            try:
                pairs = zip(self._results(), expected, strict=True)
                if all((x - y).norm() <= DISAGREE * y.norm() for x, y in pairs):
                    found.append((triton.testing.do_bench(self, warmup=5, rep=20), self.plan, self.workspace))
            except Exception:  # built, but does not run
                continue
        _, self.plan, self.workspace = min(found, key=lambda x: x[0])
        return len(found)


class CudnnFp8(Rival):
    """cuDNN's FP8 attention: per-tensor E4M3 operands and results; O, dP, dQ, dK, dV scales from a calibration run."""

    name = "cuDNN FP8"
    idle_window = False
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
        if self.idle_window and shape.window:
            raise NotImplementedError("the shape has a window already")
        left_bound = shape.length if self.idle_window else shape.window
        options |= {"left_bound": left_bound} if left_bound else {}

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

    def tune(self) -> dict[str, int]:
        tried = {"forward": self.run_forward.tune()}
        return tried | ({"backward": self.run_backward.tune()} if self.has_backward else {})

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


class CudnnFp8IdleWindow(CudnnFp8):
    """The same with a window as long as the sequence, which hides nothing, but gets another, often faster plan from cuDNN."""

    name = "cuDNN FP8, idle window"
    idle_window = True
