"""The transformers models whose forward is running in this thread, found in the calling frames."""

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn
from transformers import PreTrainedModel

_COMPILED = ("__compiled_fn", "__resume_at", "torch_dynamo_resume_in")
"""What Dynamo names the functions that it makes, and calls from the code that it makes."""


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def running_models() -> list[PreTrainedModel]:
    """The models with a method on the stack of this thread, innermost first, each once.

    A module's call passes through `nn.Module._call_impl`, so that every model under way is the `self` of some frame, whatever
    its own forward calls its first argument.
    """
    found: dict[int, PreTrainedModel] = {}
    for frame in _frames():
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, PreTrainedModel):
            found.setdefault(id(candidate), candidate)
    return list(found.values())


def runs_compiled() -> bool:
    """Whether code that `torch.compile` made is on the stack of this thread."""
    for frame in _frames():
        names = (frame.f_code.co_name, *frame.f_code.co_names)
        if any(name.startswith(_COMPILED) for name in names):
            return True
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and candidate.__dict__.get("_compiled_call_impl") is not None:
            return True
    return False
