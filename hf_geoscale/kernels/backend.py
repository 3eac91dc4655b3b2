"""Which implementation of FP8 attention runs on a device."""

from functools import lru_cache

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
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"they need an NVIDIA GPU, and the operands are on {device.type!r}"
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
