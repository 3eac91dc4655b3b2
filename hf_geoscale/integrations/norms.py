"""Gain and shift of norm layers, whose output has a bounded norm: read off the module, and verified by running it."""

import copy
import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .calls import bound_function, call_state, check_forward, is_known, own_numbers, watch_hooks
from .weights import active_module, refuse_reparametrised

logger = logging.getLogger(__name__)

_ONE_PLUS_WEIGHT = frozenset(
    ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm", "NemotronLayerNorm1P")
)
"""Classes that multiply by 1 + weight (transformers 5.23, their `forward`): believed where the module cannot be run."""

_LAYER_NORMS = frozenset(
    (
        "LayerNorm",
        "CohereLayerNorm",
        "Cohere2LayerNorm",
        "Cohere2MoeLayerNorm",
        "CohereCompassLayerNorm",
        "OlmoLayerNorm",
    )
)

SPREADS = (30.0, 1000.0)
"""Standard deviations of the rows that a norm is run on. An ε of up to 1 then moves nothing beyond the tolerance."""

TOLERANCE = 2.0**-9
"""Relative error allowed in float32. An ε of 1 beside a mean square of 900 makes half of 1/900; a wrong form is off by the gain."""

ROUNDINGS = 4
"""Units in the last place, of a lower precision, that a norm's own roundings (cast, gain, shift) may move an entry by."""

WIDTH_WITHOUT_WEIGHT = 64
"""Channels to run a norm on that has neither a weight nor a shape; any width serves."""

_verified: WeakKeyDictionary[nn.Module, tuple[tuple, float]] = WeakKeyDictionary()
"""Of norms that were run: the state in which they were, and the number that their weight gains to be the gain."""

_unverified: set[type] = set()
"""Classes of norms that could not be run, each named once in the log."""


def gain_and_shift(norm: Any, where: str) -> tuple[Tensor | None, Tensor | None]:
    """Gain g and shift β of y = g∘u + β, ‖u‖₂ ≤ √d, (d,) each; None for a norm layer without one.

    No class is believed by its name. The module's forward runs on random rows with a random weight and shift: at patching, and
    when its class, forward, hooks, shape or place change. Its output must be that of an RMS norm or a layer norm with the gain
    `weight`, 1 + `weight`, or `weight` plus the module's `offset` (Liger-Kernel). A kernel of another device cannot run. A known
    class is then believed, with a warning, until the next reading.

    Raises:
        UnsupportedModelError: any other module, or one whose call runs more than its forward; tokens after it have no bound.
    """
    norm = active_module(norm)
    refuse_reparametrised(norm, where)
    if bound_function(norm) is None:
        check_forward(norm, where)
    weight, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    whole = isinstance(norm, nn.Module) and isinstance(weight, (Tensor, type(None)))
    if not whole or (shift is not None and (weight is None or shift.shape != weight.shape)):
        raise UnsupportedModelError(f"{where} is not a norm layer that we know; tokens after it have no norm bound")
    shape = _shape(norm, weight)
    watch_hooks(norm, where)
    offset = _offset(norm, weight, shift, shape, where)
    if weight is not None and offset:
        return weight.detach().double() + offset, shift
    return weight, shift


def _shape(norm: Any, weight: Tensor | None) -> tuple[int, ...]:
    """Of the channels of one token."""
    if weight is not None:
        return tuple(weight.shape)
    return tuple(getattr(norm, "normalized_shape", None) or (WIDTH_WITHOUT_WEIGHT,))


def _offset(norm: Any, weight: Tensor | None, shift: Tensor | None, shape: tuple[int, ...], where: str) -> float:
    """The number that the weight gains to be the gain, as a run of the module says."""
    place = ("cpu", torch.float32) if weight is None else (weight.device.type, weight.dtype)
    declared = _declared_offset(norm)
    forward = bound_function(norm) or type(norm).forward
    state = (forward, call_state(norm), place, shape, declared, own_numbers(norm))
    known = _verified.get(norm)
    if known is not None and known[0] == state:
        return known[1]
    if place[0] == "meta":
        return _believed(norm, declared, where, "its weight is on the meta device")
    rows, probe = _rows(shape).to(*place), _with_random_parameters(norm)
    try:
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            out = forward(probe, rows).double()
    except Exception as error:  # a kernel of another device, say
        return _believed(norm, declared, where, f"{type(error).__name__}: {error}")
    candidates = dict.fromkeys((declared, 0.0, 1.0)) if weight is not None else (0.0,)
    for offset in candidates:
        gain = (
            torch.ones((), dtype=torch.float64, device=rows.device)
            if weight is None
            else probe.weight.double() + offset
        )
        if any(
            _agrees(out, u, gain, probe.bias if shift is not None else None, place[1])
            for u in _normalised(rows.double())
        ):
            _verified[norm] = state, offset
            return offset
    raise UnsupportedModelError(
        f"{where}, run on random rows, is neither an RMS norm nor a layer norm with the gain weight or 1 + weight; tokens after it "
        "have no norm bound"
    )


def _declared_offset(norm: Any) -> float:
    """What the module's class or attributes say; classes are looked up along the MRO, since FSDP2 derives one of its own."""
    names = {c.__name__ for c in type(norm).__mro__}
    if names & _ONE_PLUS_WEIGHT or getattr(norm, "zero_centered_gamma", False):  # the latter: Transformer Engine
        return 1.0
    return float(getattr(norm, "offset", None) or 0.0)


def _believed(norm: Any, declared: float, where: str, why: str) -> float:
    """The offset of a norm that cannot run here. Raises UnsupportedModelError where its class is not known by name either."""
    names = {c.__name__ for c in type(norm).__mro__}
    if not is_known(type(norm)) or not (
        isinstance(norm, nn.RMSNorm) or names & _LAYER_NORMS or any(name.endswith("RMSNorm") for name in names)
    ):
        raise UnsupportedModelError(f"{where} is not a norm layer that we know, and it cannot be run here ({why})")
    if type(norm) not in _unverified and not why.endswith("meta device"):  # those are read again with their weights
        _unverified.add(type(norm))
        logger.warning(
            "geoscale: %s cannot be run here (%s), so its gain is taken from its class's name until it can",
            where,
            why[:200],
        )
    return declared


def _with_random_parameters(norm: Any) -> Any:
    """A shallow copy of the module with a random weight and shift, which tell 1 + weight from exp(weight) and its like."""
    probe = copy.copy(norm)
    probe.__dict__ = dict(norm.__dict__)
    probe._parameters = dict(norm._parameters)
    generator = torch.Generator("cpu").manual_seed(1)
    for name in ("weight", "bias"):
        parameter = norm._parameters.get(name)
        if parameter is not None:
            random = torch.randn(tuple(parameter.shape), generator=generator, device="cpu")
            probe._parameters[name] = nn.Parameter(random.to(parameter.device, parameter.dtype), requires_grad=False)
    return probe


def _rows(shape: tuple[int, ...]) -> Tensor:
    """Random rows of two spreads, and one with a single large channel, as a batch of one: (1, n, *shape) float32."""
    generator = torch.Generator("cpu").manual_seed(0)
    random = [spread * torch.randn(2, *shape, generator=generator, device="cpu") for spread in SPREADS]
    single = torch.randn(1, *shape, generator=generator, device="cpu")
    single[..., 0] = SPREADS[1] * shape[-1] ** 0.5
    return torch.cat([*random, single])[None]


def _normalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as an RMS norm and as a layer norm without ε leave them."""
    centred = rows - rows.mean(-1, keepdim=True)
    return _unit(rows), _unit(centred)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def _agrees(out: Tensor, unit: Tensor, gain: Tensor, shift: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether every row of the output is g∘u + β within rounding."""
    expected, size = unit * gain, (unit * gain).abs()
    if shift is not None:
        expected, size = expected + shift.double(), size + shift.double().abs()
    if out.shape != expected.shape:
        return False
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)
    error = torch.linalg.vector_norm(out - expected, dim=-1)
    return bool((error <= tolerance * torch.linalg.vector_norm(size, dim=-1)).all())
