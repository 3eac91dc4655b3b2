"""Which implementation of FP8 attention runs on a device."""

from functools import lru_cache
from typing import NamedTuple

import torch

try:
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor as _  # noqa: F401
except ImportError:
    knobs = None

TRITON_INSTALLED = knobs is not None
INTERPRETED = knobs is not None and knobs.runtime.interpret
"""Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on any device; fixed when they are imported."""

BACKENDS = ("auto", "triton", "reference")
CAPABILITY_WITH_FP8 = (8, 9)
"""First CUDA compute capability whose matrix units multiply E4M3 (Ada; Hopper is 9.0)."""

HOPPER, PORTABLE, PLAIN, NONE = "Hopper kernels", "portable Triton kernels", "plain PyTorch", "none"
"""Names of what runs FP8 attention. NONE: backend="triton" where Triton cannot run, so that every call raises."""

USUAL_HEAD_DIM = 128
"""Head dimension assumed where nobody names one, that of most large models; `kernels.hopper` serves it."""


class KernelChoice(NamedTuple):
    """What runs an attention call."""

    name: str  # HOPPER, PORTABLE, PLAIN or NONE
    reason: str | None  # why nothing faster; None for HOPPER


@lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def stream_of(device: torch.device) -> int:
    """Handle of the current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def triton_missing(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on a device, or None where they can."""
    if not TRITON_INSTALLED:
        return "Triton 3.4 or later is not installed (torch 2.8 and later bring it along on Linux)"
    if not hasattr(torch._C, "_AutoDispatchBelowAutograd"):
        return f"torch {torch.__version__} has no torch._C._AutoDispatchBelowAutograd, which the kernels' op needs"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, and the operands are on {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY_WITH_FP8:
        name = torch.cuda.get_device_name(device)
        return f"{name} (compute capability {capability[0]}.{capability[1]}) has no FP8 matrix unit; 8.9 is the first"
    return None


def resolve_backend(
    backend: str,  # "auto", "triton" or "reference"
    device: torch.device,
) -> str:
    """ "triton" or "reference". Raises ValueError for an unknown name, RuntimeError for "triton" where it cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = triton_missing(device)
    if reason is None and (backend == "triton" or not INTERPRETED):
        return "triton"
    if backend == "triton":
        raise RuntimeError(
            f'backend="triton" cannot run: {reason}. Use backend="reference", or "auto" to take it only there'
        )
    return "reference"


def kernels_on(
    backend: str,  # "auto", "triton" or "reference"
    device: torch.device,
    head_dim: int = USUAL_HEAD_DIM,
    *,
    high: bool = False,
    dropout: bool = False,
    softcap: bool = False,
    counters: bool = False,
    quantized_logits: bool = False,
) -> str:
    """What runs an attention call: "Hopper kernels", "portable Triton kernels" or "plain PyTorch".

    "none" is backend="triton" where Triton cannot run: there each call raises RuntimeError. `choose_kernels` gives the reason too.

        >>> kernels_on("auto", torch.device("cpu"))
        'plain PyTorch'

    Args:
        device: of the operands.
        head_dim: D, channels.
        high: precision="high".
        dropout: whether attention probabilities are dropped.
        softcap: whether the logits have a soft cap.
        counters: whether logits are observed (`observe_logits`).
        quantized_logits: whether logits are rounded to FP8.
    Raises:
        ValueError: an unknown backend.
    """
    return choose_kernels(backend, device, head_dim, high, dropout, softcap, counters, quantized_logits).name


def choose_kernels(
    backend: str,
    device: torch.device,
    head_dim: int = USUAL_HEAD_DIM,
    high: bool = False,
    dropout: bool = False,
    softcap: bool = False,
    counters: bool = False,
    quantized_logits: bool = False,
) -> KernelChoice:
    """`kernels_on`, with the reason why nothing faster runs. Raises ValueError for an unknown backend."""
    try:
        resolved = resolve_backend(backend, device)
    except RuntimeError as error:
        return KernelChoice(NONE, str(error))
    if resolved == "triton":
        return fused_kernels(device, head_dim, high, dropout, softcap, counters, quantized_logits)
    if backend == "reference":
        return KernelChoice(PLAIN, 'backend="reference"')
    interpreted = 'Triton interprets its kernels (TRITON_INTERPRET=1), which backend="triton" would take'
    return KernelChoice(PLAIN, triton_missing(device) or interpreted)


@lru_cache(maxsize=256)
def fused_kernels(
    device: torch.device,
    head_dim: int,
    high: bool,
    dropout: bool,
    softcap: bool,
    counters: bool,
    quantized_logits: bool,
) -> KernelChoice:
    """Which of the fused kernels run a call, for whoever knows that they can."""
    from . import hopper  # imports Triton
    from .tiles import padded_head_dim

    reason = hopper.why_not(device, padded_head_dim(head_dim), high, dropout, softcap, counters, quantized_logits)
    return KernelChoice(HOPPER if reason is None else PORTABLE, reason)
