"""Weights that are whole only now and then: FSDP2's and ZeRO-3's shards, their versions, and the shardings that are refused.

FSDP2 gathers a decoder layer's weights right before its forward, and before its recomputation under gradient checkpointing.
Certificates are read off the gathered weights in there: no collective of ours, never more than one layer whole, and the same
bits on every rank. What the gathered copy cannot tell (its address changes with each gathering, its version counter never) is
read off the shards, right before FSDP gathers them. DeepSpeed ZeRO-3 (see `zero3`) keeps its shards next to the gathered weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_utils import is_fsdp_enabled

from ..errors import UnsupportedModelError


@dataclass
class _Shard:
    """What was seen of one parameter before its last gathering."""

    parameter: Any  # DTensor, or None before it was seen in shards
    writes: tuple
    version: object


_shards: WeakKeyDictionary[nn.Module, dict[str, _Shard]] = WeakKeyDictionary()
"""Of every module that holds a followed parameter itself, by the parameter's name."""


def is_shard(parameter: Tensor) -> bool:
    """Whether this is a DTensor, FSDP2's and tensor parallelism's form."""
    return hasattr(parameter, "full_tensor")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions this parameter; it may be gathered now."""
    return hasattr(parameter, "ds_id")


def submodules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These modules and all inside them, each once, in the order of `nn.Module.modules`, whose nested generators are slow."""
    found: dict[nn.Module, None] = {}
    waiting = list(modules)[::-1]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            if module._modules:
                waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def attribute(module: Any, name: str) -> Any:
    """`getattr(module, name, None)` that finds submodules at once: `nn.Module.__getattr__` runs only after a failed search."""
    found = module._modules.get(name)
    return getattr(module, name, None) if found is None else found


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Owner, name and parameter, of these modules and all inside them."""
    for owner in submodules(modules):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, parameter


def _writes(parameter: Any) -> tuple:
    """Address and version counters. DTensors count in-place operations on themselves; writes to the local part count there."""
    # An inference tensor counts no changes: a new object differs from every earlier version.
    counts = [object() if parameter.is_inference() else parameter._version]
    if is_shard(parameter):
        parameter = parameter._local_tensor
        counts.append(object() if parameter.is_inference() else parameter._version)
    return parameter.data_ptr(), *counts


def shards_followed() -> bool:
    """Whether `follow_shards` was called for any module."""
    return bool(_shards)


def shard_version(owner: nn.Module, name: str, parameter: Any) -> object | None:
    """Version of a sharded parameter of `owner`: changes when it is replaced or written in place. None: it is not sharded.

    In its gathered form: the version of the shards that it was gathered from. Invisible are writes that torch does not count:
    through `.data`, and by `torch._foreach_*` to DTensors. Of ZeRO-3, also a write to a gathered weight until it is released.
    """
    if is_shard(parameter):
        return _writes(parameter)
    if is_partitioned(parameter):
        return parameter.ds_id, *_writes(parameter.ds_tensor)
    followed = _shards.get(owner) if _shards else None
    if followed is None:
        return None
    return followed.setdefault(
        name, _Shard(None, (), object())
    ).version  # never seen in shards: unlike every version but itself


def follow_shards(modules: Iterable[nn.Module]) -> None:
    """From now on `shard_version` speaks of the shards behind these modules' parameters; then call `look_at_shards`."""
    for owner, _, _ in parameters_of(modules):
        _shards.setdefault(owner, {})


def look_at_shards(modules: Iterable[nn.Module]) -> None:
    """Note the versions of the shards; to be called before each gathering.

    A parameter that is still gathered keeps the version noted then. Unless its shards were written since: then it could have
    been gathered by hand before or after that, so it gets a version of its own, until its shards are seen again.
    """
    for owner, name, parameter in parameters_of(modules):
        followed = _shards.get(owner)
        if followed is None:
            continue
        if is_shard(parameter):
            writes = _writes(parameter)
            followed[name] = _Shard(parameter, writes, writes)
        elif (seen := followed.get(name)) is not None and seen.parameter is not None:
            writes = _writes(seen.parameter)
            if writes != seen.writes:
                followed[name] = _Shard(seen.parameter, writes, object())


def fsdp_units(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules to which `fully_shard` was applied."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # not on every build of torch

    return [module for module in modules if isinstance(module, FSDPModule)]


def enclosing_modules(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """Every module of the model with itself and all modules around it, outermost first."""
    paths: dict[str, tuple[nn.Module, ...]] = {"": (model,)}
    for name, module in model.named_modules():
        if name:
            paths[name] = (*paths[name.rpartition(".")[0]], module)
    return {path[-1]: path for path in paths.values()}


def can_be_read(modules: Iterable[nn.Module]) -> bool:
    """Whether the weights are here, outside a forward: not in shards, on the meta device, or still to come from rank 0.

    Those that ZeRO-3 partitions are not, even where they happen to be gathered.
    """
    parameters = [parameter for _, _, parameter in parameters_of(modules)]
    absent = bool(parameters) and all(p.is_meta for p in parameters)
    return not (is_fsdp_enabled() or absent or any(is_shard(p) or is_partitioned(p) for p in parameters))


def refuse_unreadable(modules: Iterable[nn.Module], where: str, enclosing: Iterable[nn.Module] = ()) -> None:
    """Raise UnsupportedModelError, naming the remedy, for weights that are not whole while their layer runs."""
    modules = list(modules)
    # A plain parameter without attributes of its own bears none of the marks below.
    marked = [p for _, _, p in parameters_of(modules) if type(p) is not nn.Parameter or vars(p)]
    for parameter in marked:
        if is_shard(parameter):
            what = "(a DTensor) while its attention runs" if fsdp_units(enclosing) else "by tensor parallelism"
            raise UnsupportedModelError(
                f"{where} is sharded {what}; its certificates need whole weights. Apply fully_shard to whole decoder layers "
                "(accelerate: fsdp_transformer_layer_cls_to_wrap), without a tp_plan"
            )
        if is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE":
            raise UnsupportedModelError(
                f"{where} is partitioned by DeepSpeed ZeRO-3, and not gathered while its attention runs; call patch_model before "
                "accelerator.prepare (deepspeed.initialize), and the model through what that returns"
            )
    # use_orig_params=False leaves no parameters; torch.nn.utils (prune, weight_norm) leaves others, refused by their own names
    flat = any(
        "weight" in module.__dict__ and all(p is None for p in module._parameters.values()) for module in modules
    )
    if flat or any(getattr(parameter, "_fsdp_flattened", False) for parameter in marked):
        raise UnsupportedModelError(
            f"{where} is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters hide when a weight was written; "
            "use FSDP2 (fully_shard; accelerate: fsdp_version: 2)"
        )


def refuse_parallelism(model: Any = None) -> None:
    """Raise UnsupportedModelError under tensor, context or sequence parallelism, of the model or of accelerate's state.

    FP8 attention sees the heads and tokens it is given; there they would be a part of them.
    """
    from accelerate.state import AcceleratorState  # an empty dict before there is an Accelerator

    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    if parallelism is not None and not hasattr(parallelism, "tp_size"):
        raise UnsupportedModelError(
            f"accelerate's {type(parallelism).__name__} has no tp_size, which would tell tensor parallelism. Use accelerate 1.15, "
            "or leave parallelism_config out"
        )
    given = {
        name: getattr(parallelism, f"{short}_size", None) or 1
        for short, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence"))
    }
    given["tensor"] = max(given["tensor"], getattr(model, "_tp_size", None) or 1)
    for name, size in given.items():
        if size > 1:
            raise UnsupportedModelError(
                f"{name} parallelism of {size} processes is not supported: each would see only a part of the heads or tokens. "
                "Use data parallelism (DDP, FSDP2), or unpatch the model"
            )


def refuse_replicas() -> NoReturn:
    """`_replicate_for_data_parallel` of a patched attention module, called by torch.nn.DataParallel for each further GPU.

    A replica is a shallow copy: it would run the original's forward, on weights and scales of another GPU.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        "torch.nn.DataParallel cannot replicate FP8 attention, whose forward and scales stay on one GPU (transformers' Trainer "
        "uses it where a process sees several). Use DistributedDataParallel, a process per GPU (torchrun, accelerate launch), or "
        "show the process one GPU (CUDA_VISIBLE_DEVICES), or unpatch the model"
    )
