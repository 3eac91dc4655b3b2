"""Multimodal models: which of their towers FP8 attention can run in, and how to name it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .decoders import FAMILIES


def supported_towers(outer: nn.Module, model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Models of a supported family inside one that is not, by their path from `outer`; none inside another."""
    found: dict[str, PreTrainedModel] = {}
    inside: set[nn.Module] = set()
    for name, module in outer.named_modules():
        if not isinstance(module, PreTrainedModel) or module is model or module in inside:
            continue
        if module.config.model_type in FAMILIES:
            found[name] = module
            inside.update(module.modules())
    return found


def _expression(name: str) -> str:
    """Python for a submodule of `model`."""
    parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
    return "model" + "".join(parts)


def text_config(config: Any) -> Any:
    """The configuration of a model's text tower; the model's own where there is no tower, or more than one (MusicGen)."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def refuse_by_tower(outer: nn.Module, model: PreTrainedModel, error: UnsupportedModelError) -> None:
    """Raise UnsupportedModelError that says which towers can be patched, where a model of an unsupported family holds any."""
    config: Any = model.config
    if config.model_type in FAMILIES:
        return
    if towers := supported_towers(outer, model):
        named = " or ".join(f"patch_model({_expression(name)})" for name in towers)
        kinds = ", ".join(sorted({tower.config.model_type for tower in towers.values()}))
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not supported as a whole: its other towers call the same attention interface. "
            f"Its tower of family {kinds} is: {named}"
        ) from error
    text = text_config(config)
    if text is not config and text.model_type not in FAMILIES:
        raise UnsupportedModelError(f"{error}. Its text tower {text.model_type!r} is not supported either") from error
