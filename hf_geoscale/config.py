"""The one configuration object of the package, and what it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

if TYPE_CHECKING:
    from .stability.span import SpanScaling

Scaling = Literal["geometry", "delayed", "current"]
Bound = Literal["certified", "rank_aware", "auto_alpha"]
Reduction = Literal["max", "most_recent"]
Precision = Literal["standard", "high"]
Backend = Literal["auto", "triton", "reference"]
Fallback = Literal["sdpa"]


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


@dataclass(frozen=True)
class AutoAlpha:
    """How bound="auto_alpha" finds α = max|S| / B₁ of a layer: α ← clip(margin · quantile of the α observed, floor, 1).

    Args:
        burn_in: attention calls of a layer that run with α = 1 and are observed.
        floor: least α, a guard against a burn-in on untypical text; a guess.
        quantile: of the calls' largest α, in [0, 1]; 1 is their maximum.
        margin: factor ≥ 1 on it; a guess.
    """

    burn_in: int = 100
    floor: float = 0.02
    quantile: float = 1.0
    margin: float = 2.0

    def __post_init__(self) -> None:
        if self.burn_in < 1:
            raise ValueError(f"burn_in must be at least 1 call, got {self.burn_in}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must lie in (0, 1], got {self.floor}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {self.quantile}")
        if not self.margin >= 1:
            raise ValueError(f"margin must be at least 1, got {self.margin}")


@dataclass(frozen=True)
class Delayed:
    """Options of scaling="delayed"; the defaults are Transformer Engine's.

    Args:
        history: calls whose largest magnitudes are kept.
        reduction: "max" of the history, or its "most_recent" entry.
        margin: powers of two between the largest magnitude and the largest number.
    """

    history: int = 1024
    reduction: Reduction = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be at least 1 call, got {self.history}")
        _one_of("reduction", self.reduction, get_args(Reduction))


@dataclass(frozen=True)
class GeoScaleConfig:
    """How a model's attention is quantised. Frozen; a bad value raises ValueError when built.

    Args:
        scaling: where scales come from. "geometry": the weights. "delayed" (amax history) and "current" (amax of this tensor) are
            rivals, for comparison: the first overflows after sudden changes, the second lets later tokens reach earlier ones.
        quantize_logits: also round the logits to E4M3, as arXiv 2602.18851 does; on the portable kernels, without a gain in speed.
        bound: what the scale of quantised logits rests on (q, k and v always have certificates). "certified": no input exceeds
            it. "rank_aware": exceeded with probability `failure_prob` under assumptions real tokens do not meet. "auto_alpha":
            measured in a burn-in.
        auto_alpha, delayed: options of those.
        headroom: factor ≥ 1 that scales leave above the certificates, for weights that move between refreshes.
            Costs next to nothing in accuracy up to 64 (docs/model_error.md).
        incoherent: mix q and k by a Hadamard matrix before quantising; halves their error.
        precision: "high" keeps k as two FP8 terms (one more QKᵀ product, about 0.6 of the KL divergence, docs/accuracy.md).
        backend: "triton", the fused kernels (NVIDIA GPUs from compute capability 8.9; elsewhere the first forward raises);
            "reference", plain PyTorch on any device; "auto", the first where it can run.
        fused_front_end: let the attention modules of Llama, Mistral, Qwen2, Qwen3 and Qwen3's kin hand their projections' raw
            output to the kernels, which apply the norms of q and k and RoPE as they quantise, and GPT-2's its undivided c_attn
            output; False keeps to the attention interface. Needs scaling="geometry", and serves calls without a cache.
        fallback: what to do with a call FP8 attention cannot honour: None raises, "sdpa" runs it there, counted.
        observe_logits: record the largest |logit| per head (costs a pass over the logits), for `alpha_observed`; with "triton"
            also count overflows of the logit gradients, which their bound excludes.
        failure_prob: δ of the rank-aware bound, a probability.
        max_length: L of the rank-aware bound, tokens; None takes the model's maximum.
        span_scaling: scale the parts of dQ, dK and dV in and out of their operands' spans, a reconstruction of arXiv 2512.13033;
            the forward is that of fused_front_end=False. Calls with gradients whose mask does not tell the sequences raise.
    """

    scaling: Scaling = "geometry"
    quantize_logits: bool = False
    bound: Bound = "certified"
    auto_alpha: AutoAlpha = field(default_factory=AutoAlpha)
    delayed: Delayed = field(default_factory=Delayed)
    headroom: float = 1.0
    incoherent: bool = True
    precision: Precision = "standard"
    backend: Backend = "auto"
    fused_front_end: bool = True
    fallback: Fallback | None = None
    observe_logits: bool = False
    failure_prob: float = 1e-6
    max_length: int | None = None
    span_scaling: "SpanScaling | None" = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scaling", get_args(Scaling)),
            ("bound", get_args(Bound)),
            ("precision", get_args(Precision)),
            ("backend", get_args(Backend)),
            ("fallback", (None, *get_args(Fallback))),
        ):
            _one_of(name, getattr(self, name), allowed)
        if self.bound != "certified" and not (self.quantize_logits and self.scaling == "geometry"):
            raise ValueError(
                f"bound={self.bound!r} is a bound of quantised logits: it needs quantize_logits=True and scaling='geometry', got "
                f"quantize_logits={self.quantize_logits} and scaling={self.scaling!r}"
            )
        if not 1 <= self.headroom <= 2**10:
            raise ValueError(f"headroom must lie between 1 and 1024, got {self.headroom}")
        if not 0 < self.failure_prob < 1:
            raise ValueError(f"failure_prob must lie in (0, 1), got {self.failure_prob}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {self.max_length}")
        if self.span_scaling is not None:
            from .stability.span import SpanScaling

            if not isinstance(self.span_scaling, SpanScaling):
                raise TypeError(
                    f"span_scaling must be a SpanScaling, such as SpanScaling(1.5, 1.0), or None, got {self.span_scaling!r}"
                )


class GeoScaleOverrides(TypedDict, total=False):
    """Fields of `GeoScaleConfig` as keyword arguments, for type checkers and editors."""

    scaling: Scaling
    quantize_logits: bool
    bound: Bound
    auto_alpha: AutoAlpha
    delayed: Delayed
    headroom: float
    incoherent: bool
    precision: Precision
    backend: Backend
    fused_front_end: bool
    fallback: Fallback | None
    observe_logits: bool
    failure_prob: float
    max_length: int | None
    span_scaling: "SpanScaling | None"


def resolve_config(config: Any, overrides: Mapping[str, Any], caller: str) -> GeoScaleConfig:
    """The configuration that a function was given: `config`, or the default, with these fields changed.

    Args:
        caller: the function's name, for messages.
    Raises:
        TypeError: `config` is no GeoScaleConfig, or an override is no field of one. ValueError: a bad value.
    """
    known = [f.name for f in fields(GeoScaleConfig)]
    for name in overrides:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise TypeError(
                f"{caller}() got an unexpected keyword argument {name!r}{hint} Fields of GeoScaleConfig: {', '.join(known)}"
            )
    if config is None:
        config = GeoScaleConfig()
    if not isinstance(config, GeoScaleConfig):
        raise TypeError(f"{caller}: config must be a GeoScaleConfig, got {_described(config)}")
    return replace(config, **overrides)


_CHOICES = {"scaling": Scaling, "bound": Bound, "precision": Precision, "backend": Backend, "fallback": Fallback}


def _described(config: object) -> str:
    """A wrong `config`, and how to write it."""
    if isinstance(config, str):
        named = [f"{field}={config!r}" for field, allowed in _CHOICES.items() if config in get_args(allowed)]
        how = f"write {' or '.join(named)}" if named else "fields are given by name, such as precision='high'"
        return f"{config!r}; {how}"
    if isinstance(config, Mapping):
        return f"a {type(config).__name__}; write GeoScaleConfig(**options), or pass the options as keywords: **options"
    if config is GeoScaleConfig:
        return "the class itself; write GeoScaleConfig()"
    return f"{config!r}; fields are given by name, such as precision='high'"
