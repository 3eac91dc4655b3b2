"""Where a decoder block keeps what fragility diagnostics read: norms, output projection and MLP."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..stability.fragility_control import epsilon_name
from .families import AttentionSite
from .norms import gain_and_shift
from .weights import active_module, effective_weight

OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Attributes of the projection that ends an attention, over the families of `decoders.FAMILIES`."""

FIXED_EPSILON = 1e-5
"""ε of norm layers that keep none as an attribute (OLMo's `OlmoLayerNorm.forward`)."""

SMALL = 2.0**-8
"""An entry whose square lies far below the ε of half precision (2⁻¹⁰, 2⁻⁷) and far above that of float32 (2⁻²³)."""


@dataclass(frozen=True)
class BlockModules:
    """Modules of one decoder block.

    Args:
        norms: norm layers that are direct children of the block.
        output: W_O.
        mlp: the module whose output is the MLP's branch.
        mlp_inputs, mlp_output: the linear layers of a dense MLP that read the token (the gate among them) and the one that ends
            it; empty and None where the MLP is a mixture of experts, or not built of such layers.
    """

    site: AttentionSite
    norms: list[Any]
    output: Any
    mlp: Any
    mlp_inputs: list[Any]
    mlp_output: Any | None

    def weight(self, module: Any, name: str) -> Tensor:
        """The (out, in) matrix a linear layer applies, adapters and quantisation resolved. Raises UnsupportedModelError."""
        inner = active_module(module)
        base = getattr(inner, "base_layer", inner)
        swap = type(base) is Conv1D
        shape = tuple(base.weight.shape) if swap else (base.out_features, base.in_features)
        found = effective_weight(module, self.site.describe(name), shape, None, None).weight.detach()
        return found.T if swap else found


def norm_epsilon(norm: Any) -> float:
    """ε of a norm layer."""
    norm = active_module(norm)
    name = epsilon_name(norm)
    if name is not None:
        return float(getattr(norm, name))
    if not isinstance(norm, nn.RMSNorm):
        return FIXED_EPSILON
    return rms_norm_epsilon(torch.float32 if norm.weight is None else norm.weight.dtype)


@cache
def rms_norm_epsilon(dtype: torch.dtype) -> float:
    """ε of `nn.RMSNorm(eps=None)`, told by a run: of the type torch computes in, or in older releases of the input's."""
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    output = nn.functional.rms_norm(torch.full((1,), SMALL, dtype=dtype), (1,))
    return torch.finfo(computed if float(output) > 0.5 else dtype).eps


def is_centred(norm: Any) -> bool:
    """Whether a norm layer subtracts the mean (LayerNorm) or not (RMSNorm)."""
    names = {c.__name__ for c in type(active_module(norm)).__mro__}
    return not (isinstance(norm, nn.RMSNorm) or any(name.endswith("RMSNorm") for name in names))


def _is_norm(site: AttentionSite, module: Any) -> bool:
    try:
        gain_and_shift(module, site.describe(type(module).__name__))
    except UnsupportedModelError:
        return False
    return True


def _is_linear(module: Any) -> bool:
    inner = active_module(module)
    base = getattr(inner, "base_layer", inner)
    return type(base) is Conv1D or (hasattr(base, "in_features") and hasattr(base, "out_features"))


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers inside a module, in order; adapters' own are part of the layer they adapt."""
    for child in module.children():
        if _is_linear(child):
            yield child
        else:
            yield from _linears(child)


def _width(module: Any) -> tuple[int, int]:
    """(out, in) features."""
    inner = active_module(module)
    base = getattr(inner, "base_layer", inner)
    return tuple(base.weight.shape)[::-1] if type(base) is Conv1D else (base.out_features, base.in_features)


def _parameters(modules: list[Any]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _dense_parts(linears: list[Any], total: int, width: int) -> tuple[list[Any], Any | None]:
    """Inputs and output of a dense MLP: every parameter is a linear layer's, the last leads back to the stream's width."""
    if len(linears) < 2 or _parameters(linears) != total:
        return [], None
    *first, last = linears
    if _width(last)[0] != width or any(_width(linear)[1] != width for linear in first):
        return [], None
    return first, last


def block_modules(site: AttentionSite) -> BlockModules:
    """Find the modules of a block.

    Raises:
        UnsupportedModelError: an attention whose output projection we cannot name, or a block without an MLP (DBRX).
    """
    attention = site.attention
    name = next((name for name in OUTPUT_NAMES if isinstance(getattr(attention, name, None), nn.Module)), None)
    if name is None:
        raise UnsupportedModelError(
            f"{site.describe('the attention')} has no output projection called {', '.join(OUTPUT_NAMES)}; fragility needs its norm"
        )
    output = getattr(attention, name)
    children = list(site.block.children())
    norms = [child for child in children if _is_norm(site, child)]
    rest = [c for c in children if c is not attention and c not in norms and any(True for _ in c.parameters())]
    if not rest:
        raise UnsupportedModelError(
            f"{site.describe('the block')} ({type(site.block).__name__}) holds no MLP beside its attention, so the gain of a whole "
            "layer cannot be read; fragility needs both in one block"
        )
    if all(_is_linear(child) for child in rest):  # OPT, BioGPT: fc1 and fc2 in the block itself
        mlp, linears = rest[-1], rest
    else:
        mlp = rest[-1]
        linears = list(_linears(mlp)) if len(rest) == 1 else []
    inputs, last = _dense_parts(linears, _parameters(rest), _width(output)[0])
    return BlockModules(site, norms, output, mlp, inputs, last)
