"""The attention kernels for Hopper GPUs, in Gluon: one loading warp, two or three multiplying warpgroups that share its tiles.

Same arithmetic and operands as the portable kernels, which take what these do not: other GPUs, head dimensions up to 32 or beyond
128, precision="high", dropout, a soft cap, quantised logits, and the counters of logits and dS8.
"""

import warnings
from importlib import import_module
from itertools import compress
from types import ModuleType

import torch
import triton

from ..backend import is_hopper
from ..launch import Call

TRITON_WITH_GLUON = (3, 6)
"""Release whose Gluon has what these kernels need; torch 2.10 brings it along."""

launch: ModuleType | None = None
if tuple(map(int, triton.__version__.split(".")[:2])) >= TRITON_WITH_GLUON and not triton.knobs.runtime.interpret:
    try:
        launch = import_module(".launch", __package__)
    except (
        ImportError,
        AttributeError,
        TypeError,
    ) as error:  # Gluon is experimental: a later Triton may have renamed a part
        warnings.warn(
            f"the Hopper kernels are not used, Triton {triton.__version__} has another Gluon: {error}", stacklevel=2
        )


_NOT_HERE = 'precision="high"', "dropout", "a soft cap", "quantised logits", "observed logits"
"""What a call can ask for that the portable kernels have, and these do not."""


def runs(device: torch.device, padded_dim: int) -> bool:
    """Whether there are Hopper kernels for a device and a padded head dimension."""
    if launch is None or not is_hopper(device):
        return False
    return padded_dim in launch.TABLE


def why_not(
    device: torch.device,
    padded_dim: int,
    high: bool,
    dropout: bool,
    softcap: bool,
    counters: bool,
    quantized_logits: bool,
) -> str | None:
    """Why a call needs the portable kernels; None where these serve it.

    Args:
        counters: whether logits and dS8 are counted.
    """
    if launch is not None and runs(device, padded_dim):
        asked = high, dropout, softcap, quantized_logits, counters
        return next((f"the Hopper kernels do not have {name}" for name in compress(_NOT_HERE, asked)), None)
    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels (TRITON_INTERPRET=1)"
    if not is_hopper(device):
        return f"{torch.cuda.get_device_name(device)} is no Hopper GPU" if device.type == "cuda" else "no Hopper GPU"
    if launch is None:
        return f"the Gluon of Triton {triton.__version__} is not the one that the Hopper kernels are written for"
    return f"the Hopper kernels do not have this head dimension ({padded_dim} channels once padded)"


def launches_for(call: Call, device: torch.device, counters: bool) -> ModuleType | None:
    """The launches of these kernels, or None where a call, the counters of logits or dS8 included, needs the portable ones."""
    quantized = call.logit_quant_scale is not None
    asked = call.high, call.dropout_p > 0, call.softcap > 0, counters, quantized
    return launch if why_not(device, call.padded_dim, *asked) is None else None
