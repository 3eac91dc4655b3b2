"""The one configuration object of the package."""

from dataclasses import dataclass
from typing import Literal, get_args

Bound = Literal["certified"]
Precision = Literal["standard", "high"]
Backend = Literal["auto", "triton", "reference"]
Fallback = Literal["sdpa"]


@dataclass(frozen=True)
class GeoScaleConfig:
    """How a model's attention is quantised. Frozen; a bad value raises ValueError when built.

    Args:
        bound: what the scales rest on. "certified": the weights' own certificate, which no input exceeds.
        headroom: factor ≥ 1 that scales leave above the certificates, for weights that move between refreshes.
            Costs next to nothing in accuracy up to 64 (docs/model_error.md).
        incoherent: mix q and k by a Hadamard matrix before quantising; halves their error.
        precision: "high" keeps k as two FP8 terms (one more QKᵀ product, about a third of the error).
        backend: "triton", the fused kernels (NVIDIA GPUs from compute capability 8.9; elsewhere the first forward raises);
            "reference", plain PyTorch on any device; "auto", the first where it can run.
        fallback: what to do with a call FP8 attention cannot honour: None raises, "sdpa" runs it there, counted.
        observe_logits: record the largest |logit| per head (costs a pass over the logits), for `alpha_observed`; with "triton"
            also count overflows of the logit gradients, which their bound excludes.
        failure_prob: δ of the rank-aware bound in `geometry_report`, a probability.
        max_length: L of the rank-aware bound, tokens; None takes the model's maximum.
    """

    bound: Bound = "certified"
    headroom: float = 1.0
    incoherent: bool = True
    precision: Precision = "standard"
    backend: Backend = "auto"
    fallback: Fallback | None = None
    observe_logits: bool = False
    failure_prob: float = 1e-6
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.bound in ("rank_aware", "auto_alpha"):
            raise ValueError(
                f"bound={self.bound!r} scales FP8 logits, which this release does not have; use 'certified'"
            )
        for name, allowed in (
            ("bound", get_args(Bound)),
            ("precision", get_args(Precision)),
            ("backend", get_args(Backend)),
            ("fallback", (None, *get_args(Fallback))),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if not 1 <= self.headroom <= 2**10:
            raise ValueError(f"headroom must lie between 1 and 1024, got {self.headroom}")
        if not 0 < self.failure_prob < 1:
            raise ValueError(f"failure_prob must lie in (0, 1), got {self.failure_prob}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {self.max_length}")
