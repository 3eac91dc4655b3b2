"""What the tests of masks, packing and generation compare, and how."""

import torch

from hf_geoscale import geometry_report

from ..conftest import here
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_RUNS


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.detach().double().norm())


def same_attention() -> dict[str, float]:
    """Backends, each with how far apart it may be from itself where the same attention is computed in another arrangement."""
    return {"reference": FLIPPED_ROUNDINGS} | ({"auto": FUSED_RUNS} if here().type == "cuda" else {})


def calls(model) -> tuple[int, dict[str, int]]:
    """Calls of the first layer in FP8, and those on SDPA by reason; every layer must agree."""
    rows = geometry_report(model).rows
    seen = [(row["calls"], row["fallback_reasons"]) for row in rows]
    assert all(other == seen[0] for other in seen)
    assert sum(row["overflows"] for row in rows) == 0
    return seen[0]
