"""FP8 formats, saturating casts, overflow counts and error measures. Nothing here knows where a scale comes from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FP8Format:
    """An 8-bit floating-point format (OCP FP8 specification, arXiv 2209.05433)."""

    name: str
    dtype: torch.dtype
    max: float  # largest finite value
    epsilon: float  # spacing at 1: relative rounding error of a normal number is at most half of it


E4M3 = FP8Format("E4M3", torch.float8_e4m3fn, 448.0, 2.0**-3)
E5M2 = FP8Format("E5M2", torch.float8_e5m2, 57344.0, 2.0**-2)


def saturating_cast(
    x: Tensor,  # float32, already multiplied by its quant_scale
    fmt: FP8Format = E4M3,
) -> Tensor:
    """Round to nearest even in `fmt`, clamping to ±fmt.max first; NaN stays NaN.

    A plain `.to(fp8)` saturates on some devices and gives NaN or Inf on others, so it is never relied on.
    """
    return x.clamp(-fmt.max, fmt.max).to(fmt.dtype)


def count_overflow(x: Tensor, fmt: FP8Format = E4M3) -> Tensor:
    """How many values of x lie beyond ±fmt.max (NaN included), to be asked *before* the cast: () int64."""
    return x.numel() - (x.abs() <= fmt.max).sum()


def sqnr_db(reference: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantisation-noise ratio 20·log10(‖ref‖ / ‖ref − approx‖) in decibels: () float64; +inf when equal."""
    reference, approximation = reference.double(), approximation.double()
    return 20 * torch.log10(reference.norm() / (reference - approximation).norm())
