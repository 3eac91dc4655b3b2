"""The transformers models whose forward is running in this thread, found in the calling frames."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_METHODS = frozenset(("forward", "_call_impl", "_wrapped_call_impl"))
"""Methods of a running module. Reading a frame's variables copies them, and the copy lives as long as the frame (before Python
3.13): in a caller's own function it would keep a model alive after `del model`. These frames end with the forward."""

_COMPILED = ("__compiled_fn", "__resume_at", "torch_dynamo_resume_in")
"""What Dynamo names the functions that it makes, and calls from the code that it makes."""


def _frames_around(frame: FrameType) -> Iterator[tuple[FrameType, Any]]:
    """Each frame around this one, innermost first, with the module whose method it runs, or None."""
    outer = frame.f_back
    while outer is not None:
        runs = outer.f_code.co_name in _METHODS and outer.f_code.co_varnames[:1] == ("self",)
        module = outer.f_locals.get("self") if runs else None
        yield outer, module if isinstance(module, nn.Module) else None
        outer = outer.f_back


def running_models() -> list[PreTrainedModel]:
    """The models with a forward on the stack of this thread, innermost first, each once."""
    found: dict[int, PreTrainedModel] = {}
    for _, module in _frames_around(sys._getframe()):
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module), module)
    return list(found.values())


def runs_compiled() -> bool:
    """Whether code that `torch.compile` made is on the stack of this thread."""
    for frame, module in _frames_around(sys._getframe()):
        names = (frame.f_code.co_name, *frame.f_code.co_names)
        if any(name.startswith(_COMPILED) for name in names):
            return True
        if module is not None and module.__dict__.get("_compiled_call_impl") is not None:
            return True
    return False
