"""DeepSpeed ZeRO-3: parameters that DeepSpeed gathers only while the module that owns them runs.

An attention that measures itself needs its projections and the norm before it whole, all at once. DeepSpeed offers that as
external parameters of a module (`deepspeed.zero.register_external_parameter`): it gathers them right before the module's forward
and backward, and releases them after.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from .sharding import is_partitioned, parameters_of


def _is_prepared(module: nn.Module) -> bool:
    """Whether `deepspeed.initialize` has put its hooks on this module; `zero.Init` alone puts none."""
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def partitioned_parameters(modules: Iterable[nn.Module]) -> list[Any]:
    """The parameters of these modules that DeepSpeed has partitioned, gathered now or not."""
    return [parameter for _, _, parameter in parameters_of(modules) if is_partitioned(parameter)]


def refuse_prepared(attention: Any, modules: Iterable[nn.Module], where: str) -> None:
    """Raise UnsupportedModelError where DeepSpeed has prepared the model already, and gathers these modules one by one.

    It may have recorded in which order it gathers parameters, and stops at any other.
    """
    external = getattr(attention, "_external_params", {})
    if _is_prepared(attention) and any(id(p) not in external for p in partitioned_parameters(modules)):
        raise UnsupportedModelError(
            f"{where} is partitioned by DeepSpeed ZeRO-3, which gathers its projections one by one since the model was prepared; "
            "call patch_model before accelerator.prepare (deepspeed.initialize)"
        )


def gather_together(attention: Any, modules: Iterable[nn.Module]) -> bool:
    """From now on DeepSpeed gathers these modules' parameters for the whole forward and backward of the attention.

    In a forward whose gathering came too early to know, they are gathered here: once, on every process.

    Returns:
        Whether any is partitioned.
    """
    if not (parameters := partitioned_parameters(modules)):
        return False
    from deepspeed import zero

    for parameter in parameters:
        zero.register_external_parameter(attention, parameter)
        if getattr(attention._parameters, "_in_forward", False) and parameter.ds_status.name == "NOT_AVAILABLE":
            parameter.all_gather()
    return True


def pass_by_position(attention: Any) -> RemovableHandle:
    """Have the attention's hidden states passed by position, as transformers does not.

    DeepSpeed learns from positional inputs alone when a module's backward is over; else it keeps what it gathered for the module
    until the end of the whole backward.
    """
    return attention.register_forward_pre_hook(_by_position, prepend=True, with_kwargs=True)


def _by_position(_, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if args or "hidden_states" not in kwargs:
        return None
    kwargs = dict(kwargs)
    return (kwargs.pop("hidden_states"),), kwargs
