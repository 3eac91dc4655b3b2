"""Settings a fragility probe changes for one forward, and puts back exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def ieee_float32() -> Iterator[None]:
    """No TF32 in matrix products, and the caller's setting back at the end.

    torch 2.9 and later refuse to read the old setting once the new one contradicts it, so only what can be read is written.
    """
    backend = torch.backends.cuda.matmul
    by_backend = getattr(backend, "fp32_precision", None)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen through `fp32_precision` alone
        precision = None
        backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if by_backend is not None:
            backend.fp32_precision = by_backend


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back in its own."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """This attention implementation on every config of the model, and each config's own back at the end."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    kept = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    for config, _ in kept:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, implementation in kept:
            config._attn_implementation_internal = implementation
