"""Correctness before timing: what a contender of the whole-step benchmark may differ by from SDPA, and whether it does.

Allowed is TWICE what the specification (hf_geoscale's reference backend, plain PyTorch) differs by from the same SDPA on the
same weights and up to GATE_LENGTH tokens, which includes the BF16 round-off of both. A mean loss differs by no more than the root
mean square of its tokens' differences, and a gradient's norm by no more than the norm of the gradient's difference.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from step_models import Contender
from torch import Tensor

GATE_LENGTH = 1024
TWICE = 2.0


@dataclass
class FirstStep:
    """What the first forward and backward of a contender gave."""

    loss: float
    norm: float  # of the whole gradient
    token_losses: Tensor | None = None  # (B·(L−1),)
    gradients: dict[str, Tensor] | None = None  # of q, k and v in the first and the last layer


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences from SDPA."""

    loss: float  # nats a token, root mean square over tokens
    gradients: dict[str, float]  # relative, by name

    @property
    def norm(self) -> float:
        """Of the whole gradient's norm, relative: the largest of the parts'."""
        return max(self.gradients.values())


def first_step(contender: Contender, ids: Tensor, details: bool) -> FirstStep:
    """Loss and gradient of a contender; the gradients are gone afterwards.

    Args:
        details: also the tokens' losses and the gradients of q, k, v.
    """
    model = contender.model
    with contender.running():
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters()]
    step = FirstStep(float(out.loss.detach()), float(torch.stack(norms).norm()))
    if details:
        logits = out.logits.detach()[:, :-1].float()
        step.token_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        layers = model.model.layers
        step.gradients = {
            f"{place} {name}": getattr(layer.self_attn, f"{name}_proj").weight.grad.float()
            for place, layer in (("first", layers[0]), ("last", layers[-1]))
            for name in "qkv"
        }
    model.zero_grad(set_to_none=True)
    return step


def differences(mine: FirstStep, theirs: FirstStep) -> tuple[float, dict[str, float]]:
    """Root mean square of the tokens' loss differences, and relative errors of the gradients."""
    tokens = float((mine.token_losses - theirs.token_losses).square().mean().sqrt())
    return tokens, {
        name: float((mine.gradients[name] - g).norm() / g.norm().clamp_min(1e-30))
        for name, g in theirs.gradients.items()
    }


def tolerance(specification: FirstStep, theirs: FirstStep) -> Tolerance:
    tokens, gradients = differences(specification, theirs)
    return Tolerance(TWICE * tokens, {name: TWICE * error for name, error in gradients.items()})


def wrong_in_detail(mine: FirstStep, theirs: FirstStep, allowed: Tolerance) -> str | None:
    """Why a contender fails on the short input; None if it does not. Written so that NaN fails."""
    tokens, gradients = differences(mine, theirs)
    if not tokens <= allowed.loss:
        return f"losses of tokens differ by {tokens:.2e}, allowed {allowed.loss:.2e}"
    for name, error in gradients.items():
        if not error <= allowed.gradients[name]:
            return f"gradient of {name} differs by {error:.3f}, allowed {allowed.gradients[name]:.3f}"
    return None


def wrong_in_full(mine: FirstStep, theirs: FirstStep, allowed: Tolerance) -> str | None:
    """Why a contender fails at the benchmark's own length; None if it does not."""
    if not abs(mine.loss - theirs.loss) <= allowed.loss:
        return f"loss {mine.loss:.5f}, SDPA's {theirs.loss:.5f}, allowed difference {allowed.loss:.2e}"
    if not abs(mine.norm / theirs.norm - 1) <= allowed.norm:
        return (
            f"gradient norm {mine.norm:.5g}, SDPA's {theirs.norm:.5g}, allowed relative difference {allowed.norm:.3f}"
        )
    return None
