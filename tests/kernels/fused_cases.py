"""Cases, operands and the comparison that the tests of the fused kernels share."""

import pytest
import torch
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.kernels.backend import triton_missing

from ..tolerances import FUSED_ERROR, matrix_unit_error
from .samples import draw, scales

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_KERNELS = [
    pytest.mark.skipif(
        triton_missing(DEVICE) is not None, reason=f"the fused kernels cannot run: {triton_missing(DEVICE)}"
    ),
    pytest.mark.usefixtures("hardware_rounding"),
]


def ranges(kind: str, length: int) -> Tensor:
    """key_range of two sequences, (2, L, 2)."""
    rows = torch.arange(length)
    key_range = torch.zeros(2, length, 2, dtype=torch.int32)
    if kind == "padding":  # left, with empty rows, and right
        key_range[0, :, 0], key_range[0, :, 1] = 37, length
        key_range[1, :, 1] = length - 21
    else:  # packed in documents of 50 and of 33
        for sequence, document in enumerate((50, 33)):
            key_range[sequence, :, 0] = rows // document * document
            key_range[sequence, :, 1] = (rows // document + 1) * document
    return key_range


CASES = {
    "causal": {"batch": 2},
    "full": {"causal": False},
    "window": {"rows": 150, "window": 50},
    "window of one": {"window": 1},
    "more keys": {"rows": 40, "keys": 131},
    "more queries": {"rows": 97, "keys": 53},
    "prime length": {"rows": 131},
    "length 64": {"rows": 64},
    "multi-head": {"kv_heads": 2},
    "two groups": {"heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 4},
    "more heads than run together": {"heads": 10, "kv_heads": 5, "rows": 40},
    "dim 16": {"dim": 16},
    "dim 80": {"dim": 80},
    "dim 96": {"dim": 96},
    "dim 128": {"dim": 128, "rows": 131},
    "dim 256": {"dim": 256},
    "no hadamard": {"incoherent": False},
    "high precision": {"precision": "high"},
    "high precision, dim 128": {"precision": "high", "dim": 128},
    "padding": {"ranges": "padding", "rows": 131},
    "packed": {"ranges": "packed", "rows": 131},
    "packed, not causal": {"ranges": "packed", "rows": 131, "causal": False},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 2**40 + 7},
    "dropout, high precision, packed": {"dropout_p": 0.1, "dropout_seed": 3, "precision": "high", "ranges": "packed"},
    "quantised logits": {"logit_bound": 8.0},
    "quantised logits that overflow": {"logit_bound": 1.5, "batch": 2},
    "quantised logits, window": {"logit_bound": 8.0, "rows": 150, "window": 50},
    "quantised logits, high precision, dropout, packed": {
        **{"logit_bound": 8.0, "precision": "high", "ranges": "packed"},
        **{"dropout_p": 0.1, "dropout_seed": 3},
    },
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


def operands(case: dict) -> tuple[list[Tensor], dict]:
    """q, k, v over (B, L, H, D) memory, as Transformers hands them over, and the call's options with scales."""
    options = dict(case)
    shape = {n: options.pop(n) for n in ("batch", "rows", "keys", "heads", "kv_heads", "dim", "dtype") if n in options}
    default = {"batch": 2 if "ranges" in options else 1, "heads": 2, "kv_heads": 1, "dtype": torch.bfloat16}
    drawn = draw(**{**default, **shape})
    if drawn[0].dtype == torch.float32:
        drawn = [x.bfloat16().float() for x in drawn]  # what the kernels make of float32
    leaves = [x.detach().transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2).requires_grad_() for x in drawn]
    if bound := options.pop("logit_bound", None):
        options["logit_quant_scale"] = torch.full((leaves[0].shape[1],), 448 / bound, device=DEVICE)
    if kind := options.pop("ranges", None):
        options["key_range"] = ranges(kind, leaves[0].shape[2]).to(DEVICE)
    return leaves, {**scales(*leaves), **options}


def run(leaves: list[Tensor], options: dict, backend: str = "triton") -> list[Tensor]:
    """O, dQ, dK, dV for one fixed dO."""
    out = fp8_attention(*leaves, **options, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def agree(mine: list[Tensor], theirs: list[Tensor], typical_logit: float = 0.0) -> bool:
    """Whether O, dQ, dK, dV differ by at most FUSED_ERROR, relative to each one's norm.

    Logits in the hundreds add what the matrix unit cuts off them: P̃, and with it everything, changes by that much.

    Where a row's dP − δ cancels (one visible key: dQ and dK are exactly 0) only the rounding of O in δ is left: 2⁻⁶ of ‖dV‖ is
    always granted as norm.
    """
    floor = 2.0**-6 * float(theirs[3].float().norm())
    allowed = FUSED_ERROR + (matrix_unit_error(theirs[0].shape[-1]) * typical_logit if DEVICE.type == "cuda" else 0)
    return all(
        a.dtype == b.dtype and float((a.float() - b.float()).norm()) <= allowed * max(float(b.float().norm()), floor)
        for a, b in zip(mine, theirs, strict=True)
    )
