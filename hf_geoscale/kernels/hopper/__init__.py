"""The attention kernels for Hopper GPUs, in Gluon: one loading warp, two or three multiplying warpgroups that share its tiles.

Same arithmetic and operands as the portable kernels, which take what these do not: other GPUs, head dimensions up to 32 or beyond
128, precision="high", dropout, a soft cap, quantised logits, and the counters of logits and dS8.
"""

import warnings
from importlib import import_module
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


def runs(device: torch.device, padded_dim: int) -> bool:
    """Whether there are Hopper kernels for a device and a padded head dimension."""
    if launch is None or not is_hopper(device):
        return False
    return padded_dim in launch.TABLE


def launches_for(call: Call, device: torch.device, counters: bool) -> ModuleType | None:
    """The launches of these kernels, or None where a call, the counters of logits or dS8 included, needs the portable ones."""
    if call.high or call.dropout_p or call.softcap or counters or call.logit_quant_scale is not None:
        return None
    return launch if runs(device, call.padded_dim) else None
