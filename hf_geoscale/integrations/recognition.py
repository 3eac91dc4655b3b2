"""Whether upstream's code is code that the fused forwards were written for: by its fingerprint, never by its name.

The table `known_sources` has the fingerprints. Each of these functions is cheap enough for every call: code is read once, and
compared by identity from then on.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .fingerprints import fingerprint
from .known_sources import KNOWN, RELEASES

_SHARED = ("RotaryEmbedding.forward", "RMSNorm.forward")
"""Methods whose class may be any that ends so."""

_WRAPPERS = {
    "RotaryEmbedding.forward": "dynamic_rope_update.wrapper",
    "Attention.forward": "deprecate_kwarg.wrapper.wrapped_func",
}
"""By the end of a name: the decorator's function that may stand around it."""

_PACKAGES = frozenset(RELEASES)

_NO_GRAD = "torch.utils._contextlib"
"""The module of torch whose function `torch.no_grad()` puts around another."""

_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose first update returns the keys and values that it was given."""


def _by_name() -> dict[str, frozenset[str]]:
    digests: dict[str, set[str]] = defaultdict(set)
    for path, of_releases in KNOWN.items():
        name = path.partition(":")[2]
        name = next((shared for shared in _SHARED if name.endswith(shared)), name)
        digests[name].update(of_releases)
    return {name: frozenset(found) for name, found in digests.items()}


_DIGESTS = _by_name()
_AROUND = {end: _DIGESTS[wrapper] for end, wrapper in _WRAPPERS.items()}


def is_known(function: Any, name: str) -> bool:
    """Whether a function runs the code of `name` ("LlamaAttention.forward") in a release that was read, and no other around it."""
    found = fingerprint(function)
    if found is None or found.digests[-1] not in _DIGESTS.get(name, ()):
        return False
    around = found.digests[:-1]
    if not around:
        return True
    allowed = next((digests for end, digests in _AROUND.items() if name.endswith(end)), frozenset())
    rotary = name == "RotaryEmbedding.forward"
    for wrapper, seen in zip(found.functions, around, strict=False):
        if seen not in allowed and not (rotary and wrapper.__globals__.get("__name__") == _NO_GRAD):
            return False
    return True


def origin(function: Any) -> str:
    """The Python module whose code runs; `functools.wraps` copies everything but a function's globals."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def _global(function: Any, name: str) -> Any:
    """What a name means inside a function, under its wrappers; None where it means nothing."""
    found = fingerprint(function)
    return None if found is None else _unwrapped(found.functions[-1].__globals__.get(name))


def _unwrapped(function: Any) -> Any:
    """The function inside a module that the package `kernels` made of it, while that module still calls it."""
    kind = type(function)
    if kind is FunctionType or not (isinstance(function, nn.Module) and kind.__module__.startswith("kernels.")):
        return function
    replaced = function.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not kind.forward:
        return function
    names: tuple = getattr(getattr(kind.forward, "__code__", None), "co_freevars", ())
    return kind.forward.__closure__[names.index("func")].cell_contents if "func" in names else function


def owner_of_forward(kind: type) -> type:
    """The class whose `forward` a class's instances run."""
    return next((base for base in kind.__mro__ if "forward" in base.__dict__), kind)


@dataclass(frozen=True)
class _Verdict:
    """What is unknown of an attention class, in words, as long as the code that was looked at still runs."""

    unknown: str | None
    functions: tuple[tuple[FunctionType, CodeType], ...]
    names: tuple[tuple[dict[str, Any], str, Any, Any], ...]  # (globals, name, what it meant, the function behind that)

    def holds(self) -> bool:
        """Asked in every call: it calls no function."""
        for function, code in self.functions:
            if function.__code__ is not code:
                return False
        for scope, name, meant, behind in self.names:
            if name not in scope or scope[name] is not meant:
                return False
            if meant is not behind and _unwrapped(meant) is not behind:
                return False
        return True


_VERDICTS: dict[tuple, _Verdict] = {}
"""By the forwards of the attention class and of the rotary embeddings."""


def unknown_code(attention: Any, rotary: Sequence[Any], rotates: bool) -> str | None:
    """What upstream code is not known that an attention module's call runs, in words; None where all of it is.

    Args:
        rotary: the modules that make the angles.
        rotates: whether the attention's forward rotates queries and keys.
    """
    kind = type(attention)
    key = (kind.forward, *[type(module).forward for module in rotary])
    try:
        verdict = _VERDICTS.get(key)
    except TypeError:  # a callable without a hash is none that we know
        return _unknown_forward(kind)
    if verdict is None or not verdict.holds():
        verdict = _VERDICTS[key] = _verdict(kind, rotary, rotates)
    if verdict.unknown is None:
        for module in rotary:
            if "forward" in module.__dict__ or module._forward_hooks:
                return f"its {type(module).__name__} has a hook or a forward of its own"
    return verdict.unknown


def _verdict(kind: type, rotary: Sequence[Any], rotates: bool) -> _Verdict:
    unknown = _unknown_forward(kind)
    if rotates:
        unknown = unknown or _unknown_rotation(kind) or _unknown_rotary(rotary)
    looked_at, names = [kind.forward, *(type(module).forward for module in rotary)], []  # type: ignore[attr-defined]
    caller = kind.forward  # type: ignore[attr-defined]
    for name in ("apply_rotary_pos_emb", "rotate_half") if rotates else ():
        found = fingerprint(caller)
        if found is not None:
            scope = found.functions[-1].__globals__
            caller = _unwrapped(scope.get(name))
            names.append((scope, name, scope.get(name), caller))
            looked_at.append(caller)
    functions = [f for found in map(fingerprint, looked_at) if found is not None for f in found.functions]
    return _Verdict(unknown, tuple([(f, f.__code__) for f in functions]), tuple(names))


def _unknown_forward(kind: Any) -> str | None:
    name = f"{owner_of_forward(kind).__name__}.forward"
    return None if is_known(kind.forward, name) else _unknown(kind.forward, "its forward", name)


def _unknown_rotation(kind: Any) -> str | None:
    """Of the function that rotates q and k."""
    rotate = _global(kind.forward, "apply_rotary_pos_emb")
    if is_known(rotate, "liger_rotary_pos_emb"):
        return None
    if not is_known(rotate, "apply_rotary_pos_emb"):
        return _unknown(rotate, "apply_rotary_pos_emb", "apply_rotary_pos_emb")
    half = _global(rotate, "rotate_half")
    return None if is_known(half, "rotate_half") else _unknown(half, "rotate_half", "rotate_half")


def _unknown_rotary(rotary: Sequence[Any]) -> str | None:
    """Of modules that make the angles: those of channels d and d + R/2 must be the same."""
    if not rotary:
        return "no rotary embedding was found whose angles could be known"
    for module in rotary:
        kind = type(module)
        if not is_known(kind.forward, "RotaryEmbedding.forward"):
            return _unknown(kind.forward, f"its {kind.__name__}", f"{kind.__name__}.forward")
    return None


def is_known_norm(norm: Any) -> bool:
    """Whether a module's class is an RMS norm as `kernels.qk_norm.rms_norm` computes it."""
    return is_known(type(norm).forward, "RMSNorm.forward")


def fills_plainly(cache: Any, layer: int) -> bool:
    """Whether the first update of a layer of this cache returns the keys and values that it is given."""
    if type(cache) is not DynamicCache or not is_known(DynamicCache.update, "Cache.update"):
        return False
    layers = cache.layers
    kind = type(layers[layer]) if layer < len(layers) else cache.layer_class_to_replicate
    return kind in _CACHE_LAYERS and is_known(kind.update, f"{kind.__name__}.update")


def _unknown(function: Any, what: str, name: str) -> str:
    """Why a function is not known, in words: whose it is, or which release of upstream's it is not of."""
    found = fingerprint(function)
    modules = [origin(function)] if found is None else [origin(layer) for layer in found.functions]
    foreign = [m for m in modules if m != _NO_GRAD and m.partition(".")[0] not in _PACKAGES]
    if foreign:
        return f"{foreign[0]} replaced {what}"
    if found is None or None in found.digests:
        return f"the source of {name} cannot be read"
    package = modules[-1].partition(".")[0]
    return f"{name} ({package} {_installed(package)}) is none of those known, of {package} {RELEASES[package]}"


def _installed(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of no installed package"
