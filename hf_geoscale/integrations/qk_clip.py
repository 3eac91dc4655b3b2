"""`QKClip`: after a step, shrink W_Q and W_K of the heads whose logits are, or could become, larger than a threshold."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..geometry import logit_bound, operand_bound
from ..stability import clip_factors
from .families import attention_sites
from .layer import GeoScaleLayer
from .logit_observer import LogitObserver
from .logit_weights import AttentionSlices, base_model, logit_weights
from .patched import patched_layers
from .reporting import ReportingCallback
from .sharding import is_shard

THRESHOLD = 100.0
"""Of Kimi K2 (arXiv 2507.20534)."""


class QKClip(ReportingCallback):
    """Clips W_Q and W_K of every head after an optimizer step: the head's logits shrink by γ = min(1, threshold / S_max).

        clip = QKClip(model)                     # raw loop
        ...; optimizer.step(); clip.step()
        Trainer(model, callbacks=[QKClip(model)])

    source="observed" is Kimi K2's: S_max is the largest |logit| of the training forwards since the last step, over all
    processes; evaluation counts for nothing, and until `remove()` geometry_report shows no logits of it. A patched model must have
    been patched with observe_logits=True; an unpatched one is observed under "sdpa" and "eager" attention, until `remove()`.
    source="certificate" is ours: S_max is the certificate, read off the weights without a forward or a collective. It keeps every
    logit of every input below the threshold, and clips earlier, being an upper bound.

    γ is split as √γ on W_Q and √γ on W_K; for grouped queries see `stability.clip_factors` (ours). Latent attention (observed
    only): √γ on W_UQ and W_UK, γ on W_QR, the shared W_KR stays. Biases shrink with their weights; optimizer state is left alone.

    Args:
        model: see `integrations.logit_weights`; models with q/k norms are refused, clipping does nothing to them.
        threshold: largest |logit| allowed, in nats, before the softmax.
    Attributes:
        clipped_heads: heads clipped so far, int. logit_amax: S_max of the last step, over the model.
    Raises:
        ValueError: a threshold that is not positive, an unknown source, frozen W_Q or W_K, or a model that cannot be observed.
        UnsupportedModelError: see `integrations.logit_weights`; certificates of latent attention, or of sharded weights.
    """

    def __init__(
        self, model: Any, threshold: float = THRESHOLD, source: Literal["observed", "certificate"] = "observed"
    ):
        if not 0 < threshold < float("inf"):
            raise ValueError(f"threshold must be positive and finite, got {threshold}")
        if source not in ("observed", "certificate"):
            raise ValueError(f"source must be 'observed' or 'certificate', got {source!r}")
        self.model, self.threshold, self.source = model, threshold, source
        self.weights, self.layers = logit_weights(model)
        frozen = [p.name for p in self.weights.parameters if not p.parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"QK-Clip writes W_Q and W_K, and {len(frozen)} of them are frozen ({frozen[0]}): train them, or leave QKClip out"
            )
        self.observer: LogitObserver | None = None
        self._hooks: list[Any] = []  # of a patched model's attention modules
        self.seen: list[Tensor] | None = None  # between the two calls of a Trainer
        self.clipped_heads, self.logit_amax = 0, 0.0
        if source == "observed":
            self._start_observing()
        else:
            self._certificates()  # refuses what has none

    def _start_observing(self) -> None:
        if not patched_layers(self.model):
            self.observer = LogitObserver(base_model(self.model), [layer.attention for layer in self.layers])
        elif not all(layer.config.observe_logits for layer in patched_layers(self.model)):
            raise ValueError(
                "the model was patched without observing logits: patch_model(model, observe_logits=True), or source='certificate'"
            )
        else:
            for layer in self.layers:
                self._hooks += _forget_evaluation(layer.attention)

    def remove(self) -> None:
        """Stop observing: an unpatched model gets its own attention implementation back."""
        while self._hooks:
            self._hooks.pop().remove()
        if self.observer is not None:
            self.observer.remove()
            self.observer = None

    def _certificates(self) -> list[Tensor]:
        """Certified |logit| of every layer's heads with today's weights, (Hq,) each."""
        if any(is_shard(weight.parameter) for weight in self.weights.weights):
            raise UnsupportedModelError(
                "certificates need whole weights, and FSDP2 has sharded these: use QKClip(source='observed')"
            )
        bounds = []
        with torch.no_grad():
            for site in attention_sites(base_model(self.model)):
                query, key, _ = site.projections()
                bounds.append(logit_bound(operand_bound(query), operand_bound(key), site.softmax_scale))
        return bounds

    def _observed(self) -> list[Tensor]:
        """Largest logits of the forwards since the last step, (Hq,) a layer, over all processes."""
        if self.observer is not None:
            seen = self.observer.drain()
        else:
            seen = []
            for layer in self.layers:
                state: Any = layer.attention.__dict__.get("geoscale")
                amax = state.statistics.logit_amax if isinstance(state, GeoScaleLayer) else None
                if amax is not None:
                    seen.append(amax)
                    state.statistics.logit_amax = None  # of weights that are about to change
            seen = seen if len(seen) == len(self.layers) else None
        if seen is None:
            raise ValueError(
                "QKClip saw no logits of some layer since the last step: call step() once after each optimizer step, before "
                "refresh_scales, after a forward in training mode; patch the model before QKClip(model), not after"
            )
        if dist.is_available() and dist.is_initialized():
            packed = torch.cat(seen)
            dist.all_reduce(packed, op=dist.ReduceOp.MAX)
            seen = list(packed.split([len(s) for s in seen]))
        return seen

    def _amax(self) -> list[Tensor]:
        return self._observed() if self.source == "observed" else self._certificates()

    @torch.no_grad()
    def step(self) -> int:
        """Clip with the logits seen since the last step, or with today's certificates: the number of heads clipped."""
        seen, self.seen = self.seen or self._amax(), None
        device = self.weights.weights[0].parameter.device
        factors = torch.ones(len(self.weights.names), dtype=torch.float64, device=device)
        for layer, amax in zip(self.layers, seen, strict=True):
            _fill(factors, layer, amax.to(device), self.threshold)
        largest = torch.stack([s.amax().to(device, torch.float64) for s in seen]).amax()
        exceeding = torch.stack([(s > self.threshold).sum().to(device) for s in seen]).sum()
        self.logit_amax, count = float(largest), int(exceeding)
        if count:
            self.weights.multiply(factors)
            for state in patched_layers(self.model):  # an accepted drift (GeoScaleCallback) does not cover this write
                if isinstance(state, GeoScaleLayer):
                    state.mark_stale()
        self.clipped_heads += count
        return count

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.source == "observed":
            self.seen = self._observed()  # a refresh of the scales after the step forgets them

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            metrics = {"qk_clip/clipped_heads": self.clipped_heads, "qk_clip/logit_amax": self.logit_amax}
            self.add_metrics(state, logs, metrics)


def _forget_evaluation(attention: nn.Module) -> list[Any]:
    """Hooks that give a patched attention the logits back that it had seen before a forward outside of training."""
    before: list[Tensor | None] = []

    def keep(module: nn.Module, *_: Any) -> None:
        state = module.__dict__.get("geoscale")
        if isinstance(state, GeoScaleLayer) and not module.training:
            before.append(state.statistics.logit_amax)

    def restore(module: nn.Module, *_: Any) -> None:
        state = module.__dict__.get("geoscale")
        if isinstance(state, GeoScaleLayer) and before:
            state.statistics.logit_amax = before.pop()

    return [attention.register_forward_pre_hook(keep), attention.register_forward_hook(restore, always_call=True)]


def _fill(factors: Tensor, layer: AttentionSlices, amax: Tensor, threshold: float) -> None:
    """Write one layer's factors into those of all slices."""
    query, key = clip_factors(amax, threshold, len(layer.key))
    factors[layer.query], factors[layer.key] = query, key
    if layer.rotary_query:
        factors[layer.rotary_query] = query * key
