"""Version of a module's effective weight: two calls that return the same have seen the same weights."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .calls import call_state, is_known, own_numbers
from .sharding import is_partitioned, shard_version, shards_followed

_PARTS = frozenset(("SCB", "CB", "quant_state"))
"""Attributes in which bitsandbytes keeps tensors of a parameter."""


class Identities:
    """These very objects, tensors or modules: equal to another list of the same ones, and to no other at the same addresses.

    An address and a write counter recur where a tensor is dropped and another takes its place. A weak reference to an object is
    the same for as long as the object lives, and no later object has that reference.
    """

    __slots__ = ("_references",)

    def __init__(self, objects: Iterable[Any]):
        self._references = (*map(ref, objects), None)  # the end, which is no reference

    def __eq__(self, other: object) -> bool:
        if type(other) is not Identities:
            return NotImplemented
        # in every forward: `all` would be a call for each
        for mine, others in zip(self._references, other._references, strict=False):  # noqa: SIM110
            if mine is not others:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]


MARKS = _PARTS | {"ds_id", "full_tensor", "_fsdp_flattened"}
"""Attributes of parameters that are more than one tensor, or a part of one (`sharding.is_partitioned`, `is_shard`)."""


def module_versions(modules: Sequence[nn.Module], contents: bool) -> tuple:
    """Changes when a parameter is written or replaced, a module is swapped, or an adapter is switched, merged, scaled or disabled.

    Writes through `.data` (EMA copies, PEFT's merge) count for nobody; `contents` adds a checksum of the weights' bits, one
    transfer from the device, that notices them. In training an optimizer's step follows such writes, or a change of mode.

    Args:
        modules: and all inside them (`sharding.submodules`).
    """
    shards: list[object] = []
    tensors: list[Tensor] = []
    gathered: list[Tensor] = []  # each time at another address
    plain = not shards_followed()
    for owner in modules:
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if plain and type(parameter) is nn.Parameter and MARKS.isdisjoint(vars(parameter)):
                tensors.append(parameter)
                continue
            version = shard_version(owner, name, parameter)
            if version is not None:
                shards.append(version)
                if is_partitioned(parameter):
                    gathered.append(parameter)
            else:
                tensors += stored(parameter)
    # An inference tensor counts no changes: a new object differs from every earlier version.
    writes = [(t.data_ptr(), object() if t.is_inference() else t._version) for t in tensors]
    bits = checksum([*tensors, *gathered]) if contents else None
    return (*[_state(m) for m in modules], *shards, *writes, Identities(tensors), bits)


def plain_versions(modules: Sequence[nn.Module]) -> tuple[bool, tuple] | None:
    """Whether any parameter is trained, and `module_versions` without contents, where there is nothing to look into: modules
    without any inside them, adapters or dropout, and parameters that are one tensor. None for others.

    A layer asks for it in every forward, so it is one loop; `module_versions` is what it stands for.
    """
    states: list[object] = []
    writes: list[tuple] = []
    tensors: list[Tensor] = []
    trained = False
    for module in modules:
        state, drops, adapts = _kind(type(module))  # type: ignore[arg-type]
        if module._modules or drops or adapts or "_disable_adapters" in module.__dict__:
            return None
        own = module.__dict__
        called = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        calls = call_state(module) if called else ()
        states += ((*state, type(module).forward, calls, *module._parameters),)  # no call of append
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or not MARKS.isdisjoint(parameter.__dict__):
                return None
            trained = trained or parameter.requires_grad
            tensors += (parameter,)
            writes += ((parameter.data_ptr(), object() if parameter.is_inference() else parameter._version),)
    return trained, (*states, *writes, Identities(tensors), None)


def stored(parameter: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a parameter's values: itself, or the parts of a tensor subclass and of bitsandbytes."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from stored(getattr(parameter, name))
        return
    yield parameter
    for name in ("SCB", "CB"):  # 8-bit: scales and codes until the first forward
        if isinstance(getattr(parameter, name, None), Tensor):
            yield getattr(parameter, name)
    absmax = getattr(getattr(parameter, "quant_state", None), "absmax", None)
    if absmax is not None:
        yield absmax


@lru_cache(maxsize=256)
def _kind(kind: type) -> tuple[tuple, bool, bool]:
    """Name of a module's class, whether it is a dropout or nobody's we know, and whether it is one of PEFT's."""
    return (kind.__qualname__,), issubclass(kind, nn.Dropout) or not is_known(kind), hasattr(kind, "_disable_adapters")


def _state(module: Any) -> tuple:
    """What decides a module's map besides tensors."""
    kind: Any = type(module)
    state, _, adapts = _kind(kind)
    state = (*state, kind.forward, call_state(module), *module._parameters, *own_numbers(module))
    if isinstance(module, nn.Dropout):
        return (*state, module.p, module.training)
    if adapts or "_disable_adapters" in vars(module):  # PEFT's layers and wrappers
        names = module._active_adapter
        scaling = getattr(module, "scaling", {})
        state += (
            module._disable_adapters,
            names if isinstance(names, str) else tuple(names),
            tuple(getattr(module, "merged_adapters", ())),  # which wrappers of PEFT 0.17 lack
            tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
            module.training,
            len(module._forward_pre_hooks),
        )
    return state


@torch.no_grad()
def checksum(tensors: list[Tensor]) -> tuple[int, ...]:
    """Sums of the bits of each tensor as integers, weighted by row and by column, so that exchanged rows count as a write.

    Empty tensors and those on the meta device count as 0.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: list[Tensor] = []
    for t in tensors:
        if t.is_meta or not t.numel():
            sums.append(torch.zeros((), dtype=torch.int64))
            continue
        bits = t.detach().view(integers[t.element_size()])
        bits = bits.reshape(-1, bits.shape[-1]) if bits.dim() else bits.reshape(1, 1)
        sums += [_weighted(bits.sum(dim, dtype=torch.int64)) for dim in (0, 1)]
    if len({s.device for s in sums}) > 1:
        sums = [s.cpu() for s in sums]
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _weighted(sums: Tensor) -> Tensor:
    """Each number times an odd one that grows with its place, wrapping around: ()."""
    places = torch.arange(sums.numel(), device=sums.device, dtype=torch.int64)
    return (sums * (2 * places + 1)).sum()
