"""Reading weights where float64 exists, although the model lies on a device without it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..geometry import has_float64, measuring_device
from .sharding import submodules


@contextmanager
def where_measured(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let these modules, and all inside them, hold copies of their parameters on the CPU where their device has no float64.

    Every reader of weights then works as on any other device. The copies go with the context; forwards of other threads meanwhile
    would see them, so that one of these fails with a message about two devices.
    """
    places = [
        (module._parameters, name, p)
        for module in submodules(modules)
        for name, p in module._parameters.items()
        if p is not None and not has_float64(p.device)
    ]
    try:
        for parameters, name, p in places:
            parameters[name] = _copy(p)
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


@torch.no_grad()
def _copy(parameter: nn.Parameter) -> nn.Parameter:
    copied = parameter.detach().to(measuring_device(parameter.device))
    if isinstance(copied, nn.Parameter):  # of a library that keeps more in it than a tensor
        return copied
    return nn.Parameter(copied, requires_grad=parameter.requires_grad)
