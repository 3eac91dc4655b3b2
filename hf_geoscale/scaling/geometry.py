"""Geometry scaling: scales read off the weights; no activation reaches a scale of q, k or v."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import AutoAlpha
from ..geometry import LayerGeometry
from .current import ROUND_OFF
from .formats import E4M3
from .strategy import CallOperands, QuantScales, ScalingStrategy

SMALLEST_BOUND = 2.0**-60
"""Floor of a certificate, so that all-zero weights give a finite quant_scale (any value below 2⁻⁶⁰ quantises to 0 anyway)."""


class GeometryScaling:
    """quant_scale = 448 / (headroom · bound): depends on the weights alone, so no input overflows q, k or v.

    Logits, where they are quantised, have one of three bounds. "certified": softmax_scale · N_Q · N_K, which no input exceeds, with
    RoPE or without. "rank_aware": α_min · B₁ (arXiv 2602.18851, our reconstruction), exceeded with a stated probability if tokens
    were uniform on the sphere and there were no RoPE. "auto_alpha": α·B₁ with α = 1 for `burn_in` calls, then a margin times a
    quantile of the α = max|S| / B₁ observed in them: a measured scale, for ever after. B₁ = σ(M)·d·softmax_scale.
    In a call with a soft cap the bound is the lesser of that and the cap: |cap·tanh(S/cap)| ≤ min(|S|, cap).

    Args:
        headroom: ≥ 1, room for the weights to move before the next refresh; the paper's 1/η.
        quantize_logits: whether to give a scale for logits.
        bound: "certified", "rank_aware" or "auto_alpha", of the logits.
        alpha: α_min of the model, for "rank_aware".
        auto_alpha: for "auto_alpha".
    """

    def __init__(
        self,
        headroom: float = 1.0,
        quantize_logits: bool = False,
        bound: str = "certified",
        alpha: float | None = None,
        auto_alpha: AutoAlpha | None = None,
    ):
        if bound == "rank_aware" and alpha is None:
            raise ValueError('bound="rank_aware" needs alpha, the α_min of the model')
        self.headroom, self.quantize_logits, self.bound = headroom, quantize_logits, bound
        self.alpha: Tensor | float = 1.0 if bound == "auto_alpha" else (alpha or 1.0)
        self.auto_alpha = auto_alpha or AutoAlpha()
        self.observes = quantize_logits and bound == "auto_alpha"
        self.needs_interaction = quantize_logits and bound != "certified"
        self.scales: QuantScales | None = None
        self._geometry: LayerGeometry | None = None
        self._observed: list[Tensor] = []  # α of the burn-in's calls, each ()
        self._burned_in = False

    def __getstate__(self) -> dict[str, Any]:
        """Without scales, which are of the weights that were measured; α as numbers, which share no memory with the original."""
        state = self.__dict__ | {"scales": None, "_geometry": None, "alpha": float(self.alpha)}
        return state | {"_observed": [float(alpha) for alpha in self._observed]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        observed = [torch.tensor(alpha, dtype=torch.float64) for alpha in state["_observed"]]
        self.__dict__.update(state, _observed=observed)

    @torch.inference_mode(False)  # autograd saves these scales, if a later call trains
    @torch.no_grad()
    def refresh(self, geometry: LayerGeometry) -> None:
        self._geometry = geometry
        self._end_burn_in()
        logit = None
        if self.quantize_logits:
            logit = _quant_scale(self._logit_bound(geometry), self.headroom)
        q, k, v = (
            _quant_scale(bound, self.headroom) for bound in (geometry.q_bound, geometry.k_bound, geometry.v_bound)
        )
        self.scales = QuantScales(q, k, v, logit)

    def quant_scales(self, call: CallOperands) -> QuantScales:
        if self.scales is None or self._geometry is None:
            raise RuntimeError("GeometryScaling has no scales yet: call refresh(geometry) before the first forward")
        if self.observes and not torch.is_grad_enabled() and self._end_burn_in():
            self.refresh(self._geometry)
        if self.scales.q.device != call.device:
            with torch.inference_mode(False):
                self.scales = self.scales.to(call.device)
        if call.softcap is not None and self.scales.logit is not None:
            least = ROUND_OFF * E4M3.max / (self.headroom * call.softcap)
            return replace(self.scales, logit=self.scales.logit.clamp_min(least))
        return self.scales

    def observe(self, amax: dict[str, Tensor]) -> None:
        """Only the logits of the burn-in; otherwise nothing: no activation reaches a scale."""
        if self.observes and not self._burned_in and self._geometry is not None:
            worst_case = self._worst_case(self._geometry).to(amax["logit"].device)
            self._observed.append((amax["logit"].double() / worst_case).amax())

    def use(self, geometry: LayerGeometry, scales: QuantScales) -> None:
        """`refresh`, with the scales of q, k and v that it would compute. Not for quantised logits."""
        self._geometry, self.scales = geometry, scales

    def _logit_bound(self, geometry: LayerGeometry) -> Tensor:
        if self.bound == "certified":
            return geometry.logit_bound
        worst_case = self._worst_case(geometry)
        alpha = self.alpha.to(worst_case.device) if isinstance(self.alpha, Tensor) else self.alpha
        return alpha * worst_case

    @staticmethod
    def _worst_case(geometry: LayerGeometry) -> Tensor:
        if geometry.worst_case_logit is None:
            raise ValueError("the bound of the logits needs measure_layer(..., interaction=True)")
        return geometry.worst_case_logit

    def _end_burn_in(self) -> bool:
        """Settle α once enough calls were seen. Between forwards only: a checkpointed forward and its recomputation must agree."""
        if self._burned_in or len(self._observed) < self.auto_alpha.burn_in:
            return False
        seen = torch.stack([x.to(self._observed[-1].device) for x in self._observed])
        alpha = self.auto_alpha.margin * torch.quantile(seen, self.auto_alpha.quantile)
        self.alpha, self._burned_in = alpha.clamp(self.auto_alpha.floor, 1.0), True
        return True


def _quant_scale(bound: Tensor, headroom: float) -> Tensor:
    widest = bound if headroom == 1 else headroom * bound
    return (E4M3.max / widest.clamp_min(SMALLEST_BOUND)).float()


def refresh_together(strategies: Sequence[ScalingStrategy], geometries: Sequence[LayerGeometry]) -> None:
    """`refresh` of each strategy, in a few operations for all that scale q, k and v by geometry alone."""
    together: dict[tuple, list[tuple[GeometryScaling, LayerGeometry]]] = {}
    for strategy, geometry in zip(strategies, geometries, strict=True):
        if isinstance(strategy, GeometryScaling) and not strategy.quantize_logits:
            key = (geometry.q_bound.device, strategy.headroom)
            together.setdefault(key, []).append((strategy, geometry))
        else:
            strategy.refresh(geometry)
    for (_, headroom), members in together.items():
        bounds = [b for _, geometry in members for b in (geometry.q_bound, geometry.k_bound, geometry.v_bound)]
        scales = _quant_scale(torch.cat(bounds), headroom).split([b.shape[0] for b in bounds])
        for index, (strategy, geometry) in enumerate(members):
            strategy.use(geometry, QuantScales(*scales[3 * index : 3 * index + 3]))
