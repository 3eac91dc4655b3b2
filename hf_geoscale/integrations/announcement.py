"""Which kernels a patched model's attention runs on, said once when it is patched and again when other ones turn out to run."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..geometry import has_float64
from ..kernels.backend import NONE, PLAIN, KernelChoice, choose_kernels

if TYPE_CHECKING:
    from .layer import GeoScaleLayer

PACKAGE = __name__.partition(".")[0]

logger = logging.getLogger(__name__)

_LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)
"""Where launchers tell a process its rank on its node: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH2, Slurm."""

_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")
"""Attributes in which attention classes of transformers keep their dropout, as a number or a module."""


class Console(logging.Handler):
    """Writes to stderr what the package logs, unless the root logger has handlers, which then get it instead."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def show_log() -> None:
    """Make the package's messages from INFO on visible where nobody configured logging.

    `logging.getLogger("hf_geoscale").setLevel` chooses another level, before or after.
    """
    package = logging.getLogger(PACKAGE)
    if not any(isinstance(handler, Console) for handler in package.handlers):
        package.addHandler(Console())
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)


def first_on_node() -> bool:
    """Whether this is the process of its node that prints."""
    return next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0") in ("0", "-1")


class Said:
    """The kernels that one line or another has named to the user. Layers of one model share it; a copied layer has said nothing."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __reduce__(self) -> tuple:
        return Said, ()

    def say(self, layer: "GeoScaleLayer", name: str) -> None:
        """Name the kernels that a call of this layer has just run on."""
        self.names.add(name)
        choice = planned(layer)
        reason = choice.reason if choice.name == name else None
        device = device_of(layer.site.attention)
        where = f"on {device.type} from {layer.name} on"
        _log(
            name == PLAIN and layer.config.backend == "auto",
            f"FP8 attention runs {where}: {_described(name, reason)}",
            device,
        )


def device_of(attention: nn.Module) -> torch.device:
    """Of an attention module's first parameter; the CPU where it has none."""
    return next((p.device for p in attention.parameters()), torch.device("cpu"))


def _drops(attention: Any) -> bool:
    """Whether calls of today's mode drop attention probabilities, as far as the module tells."""
    if not attention.training:
        return False
    found = [getattr(attention, name, None) for name in _DROPOUTS]
    shares = [x.p if isinstance(x, nn.Dropout) else x for x in found]
    return any(isinstance(p, float) and p > 0 for p in shares)


def planned(layer: "GeoScaleLayer") -> KernelChoice:
    """What a call of this layer would run on, where its weights are now and in its mode, and why nothing faster."""
    attention, config = layer.site.attention, layer.config
    return choose_kernels(
        config.backend,
        device_of(attention),
        layer.site.head_dim,
        high=config.precision == "high",
        dropout=_drops(attention),
        softcap=getattr(attention, "attn_logit_softcapping", None) is not None,
        counters=config.observe_logits,
        quantized_logits=config.quantize_logits,
    )


def announce(layers: Sequence["GeoScaleLayer"]) -> None:
    """Say in one line how many layers were patched, and what runs them. A warning where "auto" takes plain PyTorch for good."""
    said, device = Said(), device_of(layers[0].site.attention)
    choices = Counter(planned(layer) for layer in layers)
    for layer in layers:
        layer.said = said
    number = f"{len(layers)} layer{'s' if len(layers) > 1 else ''} in FP8"
    if device.type == "meta" or (device.type == "cpu" and torch.accelerator.is_available()):
        here = ", where plain PyTorch would run: a specification, slower than SDPA" if device.type == "cpu" else ""
        _log(
            False,
            f"{number}; the weights are on the {device.type} device now{here}. The first forward says what runs",
            device,
        )
        return
    parts = [_described(name, reason, count if len(choices) > 1 else 0) for (name, reason), count in choices.items()]
    said.names.update(choice.name for choice in choices)
    slow = layers[0].config.backend == "auto" and PLAIN in said.names
    _log(slow, f"{number}: {'; '.join(parts)}", device)


def _described(name: str, reason: str | None, layers: int = 0) -> str:
    text = f"{layers} × {name}" if layers else name
    if name == PLAIN:
        text += ", a specification: slower than SDPA"
    elif name == NONE:
        text += ", every forward will raise"
    return f"{text} ({reason})" if reason else text


def _log(warn: bool, message: str, device: torch.device) -> None:
    if not has_float64(device):
        message += f"; {device.type} has no float64, so certificates are measured on the CPU"
    if first_on_node():
        logger.log(logging.WARNING if warn else logging.INFO, "geoscale: %s", message)


show_log()
