"""References from a part of a model to the modules around it.

A plain reference would close a cycle: `del model` would free nothing before the garbage collector runs, and copying, saving or
sending one layer would take the whole model along. These references keep nothing alive. A copy or a pickle binds them to the
copied module where it has that module, and leaves them unbound where it has not.
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from torch import nn
from torch.utils.hooks import RemovableHandle

ATTRIBUTE = "geoscale_anchor"
"""Attribute of a referenced module that holds its `Anchor`."""


class Upward:
    """A reference to a module, held by something inside that module.

    Attributes:
        target: call it for the module; None once the module is gone, and in a copy without it.
    """

    __slots__ = ("__weakref__", "target")

    def __init__(self, module: nn.Module | None = None):
        self.target: Callable[[], Any] = type(None) if module is None else ref(module)

    def __reduce__(self) -> tuple:
        return Upward, ()  # the anchor of the copied module binds it

    def bind(self, module: nn.Module) -> None:
        self.target = ref(module)


class Anchor:
    """The other end: what a referenced module carries, so that a copy of the module is what copied references find.

    Args:
        hooks: of this module, to be removed with the anchor.
    """

    def __init__(self, module: nn.Module | None, upward: Upward, hooks: Iterable[RemovableHandle] = ()):
        if module is not None:  # as it is of a shallow copy whose original is gone
            upward.bind(module)
        self.upward = upward
        self.hooks = list(hooks)

    def __reduce__(self) -> tuple:
        return Anchor, (self.upward.target(), self.upward, self.hooks)


def upward_to(module: nn.Module) -> Upward:
    """A reference to this module: the one that it is anchored by, or a new one, which copies follow once it is anchored."""
    anchor = module.__dict__.get(ATTRIBUTE)
    return anchor.upward if isinstance(anchor, Anchor) and anchor.upward.target() is module else Upward(module)


def anchored(module: nn.Module, upward: Upward | None = None) -> Anchor:
    """The anchor of a module, which is given one if it has none: copies of the module follow this reference from now on."""
    anchor = module.__dict__.get(ATTRIBUTE)
    if not isinstance(anchor, Anchor) or anchor.upward.target() is not module:
        anchor = module.__dict__[ATTRIBUTE] = Anchor(module, upward or Upward(module))
    return anchor


def release(module: nn.Module) -> None:
    """Take the anchor away, with its hooks."""
    anchor = module.__dict__.pop(ATTRIBUTE, None)
    if isinstance(anchor, Anchor) and anchor.upward.target() is module:
        while anchor.hooks:
            anchor.hooks.pop().remove()
