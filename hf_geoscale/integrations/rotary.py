"""The factor that rotary embeddings put on a vector's norm: read off the modules, and verified by running them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .calls import call_state, is_known, own_numbers, watch_hooks

POSITIONS = 8
"""Positions from 0 that a rotary embedding is run on. The factor depends on none, but of a class that we do not know it may."""

FARTHEST = 2**20
"""The farthest position that a class which we do not know is run on, by powers of two."""

ROUNDING = 1e-5
"""Relative rounding error of √(cos² + sin²) in float32, tenfold."""

_measured: WeakKeyDictionary[nn.Module, tuple[tuple, float]] = WeakKeyDictionary()
"""Of modules that were run: the state in which they were, and the factor."""


def rotary_factor(rotary: Sequence[Any]) -> float:
    """Largest factor that rotary embeddings put on a vector's norm.

    1 for a rotation; YaRN and its kin multiply cos and sin by an attention factor (Phi-MoE by an `mscale` of its own), which
    channels beyond a partial rotation and layers without positions do not see, hence at least 1. A module is run once, and
    again when its class, forward, hooks or factor change: a larger factor than the module declares holds.

    Raises:
        UnsupportedModelError: a class from outside transformers that cannot be run on positions.
    """
    return max([1.0, *(max(_declared(module), _run(module)) for module in rotary)])


def rotary_embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model's rotary embeddings; each of those in a container (OLMo 3 of transformers 4)."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("rotary_emb"):
            if isinstance(module, nn.ModuleDict | nn.ModuleList):
                yield from ((f"{name}.{key}", part) for key, part in module.named_children())
            else:
                yield name, module


def rotary_state(rotary: Iterable[Any]) -> tuple:
    """Changes when the forward, a hook or the factor of a rotary embedding does."""
    found: list[object] = []
    for module in rotary:
        own = module.__dict__
        found += (type(module).forward,)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            found.append(call_state(module))
        if "attention_scaling" in own:
            found += (own["attention_scaling"],)
        else:
            found += _scalings(module)
        if not type(module).__module__.startswith("transformers."):  # asked in every forward
            found += own_numbers(module)
    return tuple(found)


def _scalings(module: Any) -> tuple[float, ...]:
    return tuple(value for name, value in vars(module).items() if name.endswith("attention_scaling"))


def _declared(module: Any) -> float:
    factors = [1.0, *_scalings(module)]
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    factors += [rope[name] for name in ("short_mscale", "long_mscale") if rope.get(name) is not None]
    return float(max(factors))


@torch.no_grad()
def _run(module: Any) -> float:
    """√(cos² + sin²) of a run; 0 where a module of transformers cannot be run."""
    watch_hooks(module, f"the rotary embedding {type(module).__name__}")
    state = (type(module).forward, call_state(module), own_numbers(module), *_scalings(module))
    known = _measured.get(module)
    if known is not None and known[0] == state:
        return known[1]
    factor = 0.0
    tensor = next(iter(module.buffers()), next(iter(module.parameters()), torch.empty(0)))
    if not tensor.is_meta:
        try:
            factor = max(_norm_of(angles) for angles in _angles(module, tensor.device))
        except Exception as error:
            if not type(module).__module__.startswith("transformers."):
                raise UnsupportedModelError(
                    f"the rotary embedding {type(module).__name__} cannot be run on positions, so its factor on queries and keys "
                    f"is unknown ({type(error).__name__}: {error}). Use a class of transformers, or unpatch the model"
                ) from error
        factor = factor if factor > 1 + ROUNDING else min(factor, 1.0)
        _measured[module] = state, factor
    return factor


def _angles(module: Any, device: torch.device) -> list[Any]:
    """What the module returns, for each of its layer types where it has several."""
    places = list(range(POSITIONS))
    if not is_known(type(module)):  # one of transformers may widen its tables for them
        places += [2**n for n in range(3, FARTHEST.bit_length())]
    rows, positions = torch.zeros(1, len(places), 1, device=device), torch.tensor(places, device=device)[None]
    kinds = {name.removesuffix("_attention_scaling") for name in vars(module) if name.endswith("_attention_scaling")}
    if not kinds:
        return [module.forward(rows, positions)]
    return [module.forward(rows, positions, layer_type=kind) for kind in sorted(kinds)]


def _norm_of(angles: Any) -> float:
    if isinstance(angles, Tensor):  # complex numbers
        return float(angles.abs().amax())
    cos, sin = angles
    return float((cos.double().square() + sin.double().square()).amax().sqrt())
