"""Where weights are measured: certificates take float64, which some devices do not have."""

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's MPS does not, nor do some Intel GPUs: there it raises, and is asked once.

    >>> has_float64(torch.device("cpu"))
    True
    """
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError, AssertionError):  # AssertionError: this torch was built without the device
        return False
    return True


def measuring_device(device: torch.device) -> torch.device:
    """Where weights that lie on a device are measured: there, or on the CPU where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")
