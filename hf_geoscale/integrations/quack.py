"""`QuacK`: logit-change control for a Hugging Face model."""

from typing import Any

from torch.optim import Optimizer

from ..stability import LogitChangeControl
from .logit_weights import LatentRules, logit_weights


class QuacK(LogitChangeControl):
    """Wraps an optimizer so that what a step does to the attention logits does not grow with W_Q and W_K.

        optimizer = QuacK(torch.optim.AdamW(model.parameters(), lr=3e-3), model, tau=1.0)

    Per head and layer the updates of W_Q and W_K become those of the learning rates (η the group's own, ₀ at the first step)

        η(W_Q[h]) = τ·η·‖W_K[g]‖₀/‖W_K[g]‖,  η(W_K[g]) = τ·η·max_h‖W_Q[h]‖₀/max_h‖W_Q[h]‖  over the query heads h that share g,

    Frobenius norms; the rules of arXiv 2511.21377 (grouped queries are ours). DeepSeek's latent attention has the paper's rules
    less the norms that cannot reach the logits: a norm follows W_DQ and W_DKV (ours; `latent_rules`). Decoupled weight decay is
    scaled with the rest of the update, as a learning rate would. Biases follow the factors of their heads and count in no norm.
    Fused weights, FSDP2 shards, schedulers, gradient accumulation, GradScaler, the Trainer and accelerate work as with the inner
    optimizer; weights are to be float32. Several optimizers (Muon for matrices, AdamW for the rest): wrap each that holds W_Q or
    W_K.
    The bound is on the change: it does not by itself cap the logits.

    Args:
        optimizer: any torch optimizer over the model's parameters, one whose update is proportional to its learning rate.
        model: see `integrations.logit_weights`.
        tau: τ > 0, dimensionless. The paper tries 0.01, 0.1, 1 and 10.
        adaptive: False leaves the norms out, τ·η throughout: the paper's control.
        latent_rules: "published" for the paper's rules for latent attention word for word. Derivation of "normalised":
            `integrations.logit_weights._read_latent`.
    Raises:
        UnsupportedModelError: an unknown family, q/k norms, adapters or quantised weights on queries or keys.
        TypeError, ValueError: see `stability.LogitChangeControl`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: Any,
        tau: float = 1.0,
        adaptive: bool = True,
        latent_rules: LatentRules = "normalised",
    ):
        super().__init__(optimizer, logit_weights(model, latent_rules)[0], tau, adaptive)
