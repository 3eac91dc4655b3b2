"""Correctness before timing: what a contender of the whole-step benchmark may differ by from SDPA, and whether it does.

Allowed is TWICE what the specification (hf_geoscale's reference backend, plain PyTorch) differs by from the same SDPA on the
same weights and up to GATE_LENGTH tokens, which includes the BF16 round-off of both. The specification does not fit into memory at
the benchmark's own length. There, of N tokens:

- the root mean square of the tokens' loss differences is held to the same bound, since each token averages over more keys;
- their mean, to TWICE the specification's own mean, which does not average out, plus STANDARD_ERRORS · rms / √N, as for
  independent tokens (commit 69e0a98, one H100 80 GB, two models, 2,048 to 32,768 tokens: at most 1.34 · rms / √N);
- the whole gradient's norm, to TWICE the root mean square, over all parameters, of what the norms of the specification's gradients
  differ by (the same runs: at most 0.2 %).

All of it runs twice: on random tokens, whose sums stay small, and on tokens of which REPEATED are one and the same
(`coherent`). There values have a mean, and sums over thousands of keys grow (docs/sums.md). Losses of such tokens err
together, so their mean is held to the bound of their root mean square alone.

What passes: a fault smaller than FP8's own error, as a mask that is off by one only at positions of thousands of keys.
"""

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from step_models import Contender
from torch import Tensor

GATE_LENGTH = 1024
TWICE = 2.0
STANDARD_ERRORS = 4.0
"""Of a mean loss: chance alone goes beyond once in 16,000 times."""
REPEATED = 0.75
"""Share of the tokens that are one and the same, where sums are to be coherent."""
CHUNK = 1024
"""Tokens whose float32 logits are in memory at a time."""


@dataclass
class FirstStep:
    """What the first forward and backward of a contender gave."""

    loss: float
    norms: Tensor  # (P,) of every parameter's gradient
    token_losses: Tensor  # (B·(L−1),)
    gradients: dict[str, Tensor] | None = None  # of q, k and v in the first and the last layer

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return float(self.norms.norm())


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences from SDPA."""

    loss: float  # nats a token, root mean square over tokens
    bias: float  # nats a token, of the mean over however many tokens
    gradients: dict[str, float]  # relative, by name
    norm: float  # of the whole gradient's, relative

    def mean_loss(self, tokens: int) -> float:
        """Nats, of the mean over so many tokens."""
        return self.bias + STANDARD_ERRORS * self.loss / TWICE / sqrt(tokens)


def coherent(ids: Tensor) -> Tensor:
    """Tokens (B, L), with REPEATED of them replaced by the first."""
    generator = torch.Generator().manual_seed(1)
    replaced = torch.rand(ids.shape, generator=generator) < REPEATED
    return torch.where(replaced.to(ids.device), ids[:, :1], ids)


@torch.no_grad()
def losses_of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, L, vocabulary) and (B, L) to (B·(L−1),), in float32."""
    pairs = zip(logits[:, :-1].flatten(0, 1).split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(x.float(), target, reduction="none") for x, target in pairs])


def first_step(contender: Contender, ids: Tensor, details: bool) -> FirstStep:
    """Loss and gradient of a contender; the gradients are gone afterwards.

    Args:
        details: also the gradients of q, k, v.
    """
    model = contender.model
    with contender.running():
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
    norms = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters()])
    step = FirstStep(float(out.loss.detach()), norms, losses_of_tokens(out.logits.detach(), ids))
    if details:
        layers = model.model.layers
        step.gradients = {
            f"{place} {name}": getattr(layer.self_attn, f"{name}_proj").weight.grad.float()
            for place, layer in (("first", layers[0]), ("last", layers[-1]))
            for name in "qkv"
        }
    model.zero_grad(set_to_none=True)
    return step


def loss_difference(mine: FirstStep, theirs: FirstStep) -> float:
    """Root mean square over tokens, nats."""
    return float((mine.token_losses - theirs.token_losses).square().mean().sqrt())


def gradient_differences(mine: FirstStep, theirs: FirstStep) -> dict[str, float]:
    """Relative errors."""
    return {
        name: float((mine.gradients[name] - g).norm() / g.norm().clamp_min(1e-30))
        for name, g in theirs.gradients.items()
    }


def tolerance(specification: FirstStep, theirs: FirstStep) -> Tolerance:
    mean = float((specification.token_losses - theirs.token_losses).mean())
    gradients = {name: TWICE * error for name, error in gradient_differences(specification, theirs).items()}
    norm = TWICE * float((specification.norms / theirs.norms.clamp_min(1e-30) - 1).square().mean().sqrt())
    return Tolerance(TWICE * loss_difference(specification, theirs), TWICE * abs(mean), gradients, norm)


def wrong_losses(mine: FirstStep, theirs: FirstStep, allowed: Tolerance) -> str | None:
    difference = loss_difference(mine, theirs)
    if not difference <= allowed.loss:
        return f"losses of tokens differ by {difference:.2e}, allowed {allowed.loss:.2e}"
    return None


def wrong_in_detail(mine: FirstStep, theirs: FirstStep, allowed: Tolerance) -> str | None:
    """Why a contender fails on the short input; None if it does not. Written so that NaN fails."""
    if reason := wrong_losses(mine, theirs, allowed):
        return reason
    for name, error in gradient_differences(mine, theirs).items():
        if not error <= allowed.gradients[name]:
            return f"gradient of {name} differs by {error:.3f}, allowed {allowed.gradients[name]:.3f}"
    return None


def wrong_in_full(mine: FirstStep, theirs: FirstStep, allowed: Tolerance, independent: bool = True) -> str | None:
    """Why a contender fails at the benchmark's own length; None if it does not.

    Args:
        independent: whether the losses of tokens err independently, so that their mean is better than they are.
    """
    if reason := wrong_losses(mine, theirs, allowed):
        return reason
    most = allowed.mean_loss(len(theirs.token_losses)) if independent else allowed.loss
    if not abs(mine.loss - theirs.loss) <= most:
        return f"loss {mine.loss:.5f}, SDPA's {theirs.loss:.5f}, allowed difference {most:.2e}"
    if not abs(mine.norm / theirs.norm - 1) <= allowed.norm:
        return (
            f"gradient norm {mine.norm:.5g}, SDPA's {theirs.norm:.5g}, allowed relative difference {allowed.norm:.3f}"
        )
    return None
