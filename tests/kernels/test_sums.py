"""The kernels against float64 where sums grow with the length: even attention over values and gradients with a mean.

Random inputs hide what a short accumulator loses (docs/sums.md). O is held to COHERENT_ERROR, since roundings average
out. So is dV where gradients have a mean. All else is held to the specification's own error on the same input.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.coherent import NAMES, draw, exact, masked, relative, spans
from hf_geoscale import fp8_attention
from hf_geoscale.kernels.backend import triton_missing
from hf_geoscale.kernels.philox import dropout_keep

from ..tolerances import COHERENT_ERROR, OVER_SPECIFICATION
from .attention_model import AttentionModel, Tiling, hopper_tilings
from .fused_cases import DEVICE, NEEDS_KERNELS
from .samples import scales

pytestmark = NEEDS_KERNELS
if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import passes

LONG, LONGER = 8192, 32768
CASES = ("uniform", "+mean")
LAST = 512
LOGIT_BOUND = 2.0
SOFTCAP = 5.0
DROPOUT = {"dropout_p": 0.1, "dropout_seed": 7}

HOPPER: dict[str, dict[str, Any]] = {
    "causal": {"length": LONGER},
    "causal, D 64": {"length": LONGER, "dim": 64},
    "full": {"form": "full"},
    "window": {"form": "window"},
    "window, D 64": {"form": "window", "dim": 64},
    "packed": {"form": "packed"},
    "packed, D 64": {"form": "packed", "dim": 64},
    "padded": {"form": "padded"},
}
"""Calls that the Hopper kernels serve there, and the portable ones on other GPUs."""

PORTABLE: dict[str, dict[str, Any]] = {
    "causal": {"length": LONGER},
    "causal, D 64": {"length": LONGER, "dim": 64},
    "causal, D 32": {"dim": 32},
    "causal, D 256": {"dim": 256},
    "window": {"form": "window"},
    "packed": {"form": "packed"},
    "high": {"precision": "high"},
    "high, longer": {"precision": "high", "length": LONGER},
    "high, D 64": {"precision": "high", "dim": 64},
    "high, packed": {"precision": "high", "form": "packed"},
    "dropout": DROPOUT,
    "soft cap": {"softcap": SOFTCAP},
    "quantised logits": {"logit_bound": LOGIT_BOUND},
    "quantised logits, soft cap, window": {"logit_bound": LOGIT_BOUND, "softcap": SOFTCAP, "form": "window"},
}


class Problem:
    """Inputs of a call on the device, its options, and the truth in float64."""

    def __init__(self, case: str, length: int = LONG, dim: int = 128, form: str = "causal", **options: Any):
        self.leaves = draw(case, length, dim, device=DEVICE)
        self.grad = self.leaves.pop()
        mask = {"causal": False} if form == "full" else masked(form, length, DEVICE)
        if bound := options.pop("logit_bound", None):
            options["logit_quant_scale"] = torch.full((2,), 448 / bound, device=DEVICE)
        self.options = {**scales(*self.leaves), **mask, **options}
        dropout_p = options.get("dropout_p", 0.0)
        self.truth = exact(
            *self.leaves,
            self.grad,
            spans(length, DEVICE, **mask),
            softcap=options.get("softcap"),
            keep=functools.partial(self._keep, dropout_p, options["dropout_seed"]) if dropout_p else None,
            survival=1 - dropout_p,
        )

    @staticmethod
    def _keep(dropout_p: float, seed: int, rows: slice, keys: slice) -> Tensor:
        indices = (torch.arange(x.start, x.stop, device=DEVICE) for x in (rows, keys))
        return dropout_keep(seed, dropout_p, 2, *indices)[None]

    def errors(self, backend: str) -> dict[str, float]:
        """Relative, of O, dQ, dK, dV and the last rows of O."""
        out = fp8_attention(*self.leaves, **self.options, backend=backend)
        results = [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)]
        found = {name: relative(x, y) for name, x, y in zip(NAMES, results, self.truth, strict=True)}
        return found | {"last": relative(out[:, :, -LAST:], self.truth[0][:, :, -LAST:])}


def too_large(case: str, found: dict[str, float], specified: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Errors that are too large, with what is allowed: none. Written so that NaN is one."""
    exactly = ("O", "last", "dV") if case == "+mean" else ("O", "last")
    allowed = {name: COHERENT_ERROR if name in exactly else OVER_SPECIFICATION * specified[name] for name in found}
    return {name: (error, allowed[name]) for name, error in found.items() if not error <= allowed[name]}


@pytest.mark.parametrize("case", CASES)
class TestSpecification:
    """The limits are not beyond the specification: on a CPU at the length from which roundings average out."""

    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("form", ["causal", "window"])
    def test_it_keeps_them(self, case, dim, form):
        specified = Problem(case, 1024, dim, form).errors("reference")
        assert not too_large(case, specified, specified)


@pytest.mark.parametrize("case", CASES)
class TestInterpreter:
    """Its sums are float32 sums, so it shows the tiles' arithmetic alone."""

    @pytest.mark.skipif(DEVICE.type == "cuda", reason="is about Triton's interpreter")
    def test_short_rows(self, case):
        problem = Problem(case, 320, 64)
        found, specified = problem.errors("triton"), problem.errors("reference")
        assert all(found[name] <= OVER_SPECIFICATION * specified[name] for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
class TestOnAGpu:
    @pytest.mark.parametrize("call", HOPPER)
    def test_the_kernels_that_a_gpu_takes_by_itself(self, case, call):
        problem = Problem(case, **HOPPER[call])
        assert not too_large(case, problem.errors("triton"), problem.errors("reference"))

    @pytest.mark.parametrize("call", PORTABLE)
    def test_the_portable_kernels(self, case, call, monkeypatch):
        monkeypatch.setattr(passes.hopper, "launches_for", lambda *_, **__: None)
        problem = Problem(case, **PORTABLE[call])
        assert not too_large(case, problem.errors("triton"), problem.errors("reference"))


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() != (9, 0), reason="is about a Hopper GPU's matrix unit"
)
class TestModel:
    """What the model of the matrix unit says of the Hopper kernels holds, also where a channel outweighs the others in S and dP."""

    WITHIN = 1.5
    ROWS = 64

    @pytest.mark.parametrize("case", ["uniform", "+mean", "dominant channel", "biased keys"])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_it_predicts_the_errors_of_the_kernels(self, case, dim):
        problem = Problem(case, LONG, dim)
        out = fp8_attention(*problem.leaves, **problem.options, backend="triton")
        dq, *_ = torch.autograd.grad(out, problem.leaves, problem.grad)
        tensors = [x.detach()[0, 0].cpu() for x in (*problem.leaves, problem.grad)]
        rows = torch.arange(LONG // self.ROWS - 1, LONG, LONG // self.ROWS)
        model = AttentionModel(*tensors, self.tiling(dim), True)
        predicted = model.forward(rows)
        for mine, modelled, truth in (
            (out, predicted.out, problem.truth[0]),
            (dq, model.query_gradient(predicted), problem.truth[1]),
        ):
            exactly = truth[0, 0, rows.to(DEVICE)].cpu()
            measured = relative(mine.detach()[0, 0, rows.to(DEVICE)].cpu(), exactly)
            assert 1 / self.WITHIN <= measured / relative(modelled, exactly) <= self.WITHIN

    @staticmethod
    def tiling(dim: int) -> Tiling:
        return hopper_tilings()[dim]
