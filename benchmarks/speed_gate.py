"""Correctness before timing, for the speed benchmark of the op: errors of O, dQ, dK, dV against exact float32.

Allowed is, tensor by tensor, twice what the specification (the reference backend, in plain PyTorch) has on the very same input; for
BF16 implementations twice what docs/gradient_error.md has for BF16 attention. Checked at GATE_LENGTH tokens with all heads, and at
odd lengths with one key/value head and its query heads, since float32 logits of all would not fit.

FP8 implementations also meet sums that grow with the length: COHERENT_CASE at COHERENT_LENGTHS, one key/value head,
float64. Ours are left out if such sums are wrong. Other libraries are timed nevertheless, and the page says so: without
them there would be no FP8 attention to compare with.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from coherent import draw as draw_coherent
from coherent import exact as exact_in_float64
from coherent import spans
from rivals import Results, Shape
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.scaling import E4M3

GATE_LENGTH, GATE_WINDOW = 512, 200
ODD_LENGTHS = (4099, 8191)
COHERENT_CASE, COHERENT_LENGTHS = "+mean", (8192, 32768)
OURS = "hf_geoscale"
TWICE = 2.0
E5M2_GRADIENTS = ("Transformer Engine FP8",)
"""Implementations that round gradients to E5M2, whose unit roundoff, 2⁻³, is twice E4M3's."""

GRADIENT_ERROR = Path(__file__).parent.parent / "docs" / "gradient_error.md"
NAMES = ("O", "dQ", "dK", "dV")
WRONG = "wrong: "


def quant_scale(x: Tensor) -> Tensor:
    """Per-head factor from 1.5 × the largest row norm, as a certificate leaves it: (H,)."""
    return E4M3.max / (1.5 * x.detach().float().norm(dim=-1).amax((0, 2)))


def draw(shape: Shape, seed: int = 0, device: str = "cuda") -> list[Tensor]:
    """q, k, v, dO: standard normal BF16, views of (B, L, H, D) memory."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    tensors = [
        torch.randn(shape.batch, shape.length, h, shape.dim, generator=generator, device=device)
        .bfloat16()
        .transpose(1, 2)
        for h in heads
    ]
    return [x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape) -> list[Tensor]:
    """O, dQ, dK, dV in float32 from dense attention."""
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    rows = torch.arange(shape.length, device=q.device)
    visible = rows[:, None] >= rows[None, :]
    if shape.window:
        visible &= rows[:, None] - rows[None, :] < shape.window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return [out, *torch.autograd.grad(out, (q, k, v), grad.float())]


def specification(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shape: Shape, high: bool) -> list[Tensor]:
    """O, dQ, dK, dV by the reference backend."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = fp8_attention(
        q,
        k,
        v,
        q_quant_scale=quant_scale(q),
        k_quant_scale=quant_scale(k),
        v_quant_scale=quant_scale(v),
        causal=shape.causal,
        window=shape.window,
        precision="high" if high else "standard",
        backend="reference",
    )
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def published_errors(variant: str) -> dict[str, float]:
    """Mean relative errors of O, dQ, dK, dV in a row of docs/gradient_error.md."""
    row = next(line for line in GRADIENT_ERROR.read_text().splitlines() if line.startswith(f"| {variant} |"))
    return dict(zip(NAMES, (float(cell.split("±")[0]) for cell in row.strip("| ").split("|")[1:]), strict=True))


def relative_errors(results: Results | list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """‖x − exact‖ / ‖exact‖ of every result that there is."""
    pairs = zip(NAMES, results, truth, strict=True)
    return {name: float((x.detach().float() - y).norm() / y.norm()) for name, x, y in pairs if x is not None}


class Gate:
    """Inputs of one problem at one length, their exact results, and what may differ from them."""

    def __init__(self, shape: Shape, device: str = "cuda", case: str | None = None):
        self.shape, self.case = shape, case
        if case is None:
            self.tensors = draw(shape, seed=1, device=device)
            self.truth = [x.detach() for x in exact(*self.tensors, shape)]
        else:
            sizes = (shape.length, shape.dim, shape.heads, shape.kv_heads, shape.batch)
            self.tensors = draw_coherent(case, *sizes, seed=1, device=device)
            bounds = spans(shape.length, device, shape.causal, shape.window)
            self.truth = exact_in_float64(*self.tensors, bounds)
        self.specified = {
            high: relative_errors(specification(*self.tensors, shape, high), self.truth) for high in (False, True)
        }

    def allowed(self, name: str) -> dict[str, float]:
        """Largest relative errors of an implementation, by its name."""
        errors = self.specified[name.endswith("high")] if "FP8" in name else published_errors("BF16 attention")
        coarse = {tensor: 2.0 if name in E5M2_GRADIENTS and tensor != "O" else 1.0 for tensor in errors}
        return {tensor: TWICE * coarse[tensor] * error for tensor, error in errors.items()}

    def check(self, name: str, make: Callable) -> tuple[str | None, dict[str, float]]:
        """Why an implementation fails, or None, and its errors; the reason begins with WRONG if it ran."""
        try:
            results = make(*self.tensors, self.shape).result()
        except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}", {}
        errors = relative_errors(results, self.truth)
        allowed = self.allowed(name)
        for tensor, error in errors.items():
            if not error <= allowed[tensor]:
                where = f"{self.shape.length} tokens" + (f' of "{self.case}"' if self.case else "")
                reason = f"{tensor} has relative error {error:.4f} at {where}, allowed {allowed[tensor]:.4f}"
                return WRONG + reason, errors
        return None, errors


def correct(
    shape: Shape, contenders: dict[str, Callable], device: str = "cuda"
) -> tuple[dict[str, dict[str, float]], dict[str, str], dict[str, str]]:
    """Errors at GATE_LENGTH of the implementations that may be timed on a shape's heads and window, and why others may not.

    One that is wrong at any length is left out; one that does not run at an odd length, though it runs at GATE_LENGTH, is kept.
    Last come other libraries' faults on coherent sums, for which none is left out.
    """
    window = min(shape.window or 0, GATE_WINDOW) or None
    gate = Gate(replace(shape, batch=1, length=GATE_LENGTH, window=window), device)
    found: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name, make in contenders.items():
        reason, errors = gate.check(name, make)
        print(f"  {name}: {reason or 'correct'}", flush=True)
        if reason is None:
            found[name] = errors
        else:
            reasons[name] = reason
    for length in ODD_LENGTHS:
        one = replace(shape, batch=1, length=length, heads=shape.heads // shape.kv_heads, kv_heads=1)
        gate = Gate(one, device)
        for name in list(found):
            reason, _ = gate.check(name, contenders[name])
            if reason:
                print(f"  {name}, {length} tokens: {reason}", flush=True)
            if reason and reason.startswith(WRONG):
                del found[name]
                reasons[name] = reason
    return found, reasons, _coherent_faults(shape, contenders, found, reasons, device)


def _coherent_faults(
    shape: Shape,
    contenders: dict[str, Callable],
    found: dict[str, dict[str, float]],
    reasons: dict[str, str],
    device: str,
) -> dict[str, str]:
    """The first fault of each FP8 implementation of another library. Ours move from `found` to `reasons`."""
    faults: dict[str, str] = {}
    for length in COHERENT_LENGTHS:
        one = replace(shape, batch=1, length=length, heads=shape.heads // shape.kv_heads, kv_heads=1)
        gate = Gate(one, device, COHERENT_CASE)
        for name in [name for name in found if "FP8" in name and name not in faults]:
            reason, _ = gate.check(name, contenders[name])
            if reason is None or not reason.startswith(WRONG):
                continue
            print(f"  {name}, {length} tokens: {reason}", flush=True)
            if name.startswith(OURS):
                del found[name]
                reasons[name] = reason
            else:
                faults[name] = reason.removeprefix(WRONG)
    return faults
