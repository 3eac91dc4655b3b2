"""The name `geoscale` in transformers, there from the moment that transformers' modelling code is imported.

`import hf_geoscale` imports neither torch nor transformers, so it cannot register an attention itself. It leaves a finder on
`sys.meta_path`, which registers the name as soon as the two modules with the interfaces have run. The functions registered here
import the package's own at their first call, and these take the name over.
"""

import sys
from _thread import get_ident
from collections.abc import Callable
from typing import Any

NAME = "geoscale"
"""The attention implementation's name in transformers, on the attention and on the mask interface."""

_INTERFACES = {
    "transformers.modeling_utils": ("AttentionInterface", "attention_by_name"),
    "transformers.masking_utils": ("AttentionMaskInterface", "mask_by_name"),
}
"""Module of transformers → its interface, and the function of `integrations.by_name` for it."""


def _at_first_call(function: str) -> Callable:
    import torch

    def first_call(*args, **kwargs) -> Any:
        from .integrations import by_name

        return getattr(by_name, function)(*args, **kwargs)

    return torch.compiler.disable(first_call)


_missing = set(_INTERFACES)


def register_loaded() -> None:
    """Register the name on the interfaces that are loaded by now and do not have it."""
    for name in list(_missing):
        interface, function = _INTERFACES[name]
        kind = getattr(sys.modules.get(name), interface, None)
        if kind is not None:
            _missing.discard(name)
            if NAME not in kind():
                kind.register(NAME, _at_first_call(function))


class InterfaceFinder:
    """Finds modules as the finders after it do, and registers the name once one with an interface has run.

    It stays on `sys.meta_path`: taking it off while an import walks the list would have the next finder skipped.
    """

    def __init__(self) -> None:
        self._searches: set[tuple[str, int]] = set()  # under way: module, thread

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if _missing:  # a module that another finder found first, or that was half imported before
            register_loaded()
        search = (name, get_ident())
        if name not in _INTERFACES or search in self._searches:
            return None
        self._searches.add(search)
        try:
            spec = self._find(name, path, target)
        finally:
            self._searches.discard(search)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader, name)
        return spec

    def _find(self, name: str, path: Any, target: Any) -> Any:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                return spec
        return None


def _register_after(loader: Any, name: str) -> None:
    """Have this loader register the name after it has run its module, once."""
    execute = loader.exec_module
    replaced = "exec_module" in getattr(loader, "__dict__", {})  # by somebody before us

    def exec_module(module: Any) -> None:
        if replaced:
            loader.exec_module = execute
        else:
            del loader.exec_module
        execute(module)
        _missing.add(name)  # this may be a second import of the module
        register_loaded()

    try:
        loader.exec_module = exec_module
    except AttributeError:  # a loader with slots: the next import of any module registers the name
        _missing.add(name)


def install() -> None:
    """Register the name now or when there is something to register it on; called twice, it does nothing more."""
    if not any(type(finder).__name__ == InterfaceFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, InterfaceFinder())
    register_loaded()
