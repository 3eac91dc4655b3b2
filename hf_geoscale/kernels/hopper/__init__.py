"""The attention kernels for Hopper GPUs, in Gluon: one loading warp, two or three multiplying warpgroups that share its tiles.

Same arithmetic and operands as the portable kernels, which take what these do not: other GPUs, head dimensions up to 32 or beyond
128, precision="high", dropout, and the counters of logits and dS8.
"""

import torch
import triton

TRITON_WITH_GLUON = (3, 6)
"""Release whose Gluon has what these kernels need; torch 2.10 brings it along."""

if (
    tuple(int(part) for part in triton.__version__.split(".")[:2]) >= TRITON_WITH_GLUON
    and not triton.knobs.runtime.interpret
):
    from . import launch
else:
    launch = None


def takes(call, device: torch.device, count: bool) -> bool:
    """Whether these kernels run a call; `count` asks for the counters."""
    return (
        launch is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and call.padded_dim in launch.TABLE
        and not (call.high or call.dropout_p or count)
    )
