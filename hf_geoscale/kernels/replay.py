"""A pass of the fused kernels with a signature met before: its launches once more, at other addresses, and nothing else.

All that a pass works out on the CPU (grids, strides, tile shapes, descriptors, what Triton specialises on) follows from the shapes,
strides, dtypes and options of its inputs. The first call with a signature runs as written, and is recorded: what it allocates and
what it launches. Later ones allocate, put today's addresses into the recorded arguments, and launch.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import launcher
from .launcher import Described, Launched

SIGNATURES = 64
"""Plans kept of a pass: new lengths make new ones. When it is full, all are forgotten."""

TENSOR_MAPS = 256
"""Addresses kept of one descriptor of a plan: those of as many layers."""

ATTEMPTS = 2
"""Calls with one signature that are recorded in vain before recording is given up: the first may upload Hadamard signs."""

ALIGNMENT = 512
"""Bytes that sections of a workspace start at a multiple of, as tensors of CUDA's allocator do."""

WORKSPACE_BYTES = 2**26
"""Up to here all that a pass needs for itself is one allocation. Larger tensors fit the gaps of a full memory one by one."""

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default, _aten.zeros.default,
}  # fmt: skip


class Unrepeatable(Exception):
    """A recorded call did what need not follow from its signature."""


def _storage(x: Tensor) -> int:
    """Equal for two living tensors that share memory, and for no others."""
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Of its storage, up to where another section may start."""
    return -(-x.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT


class _Allocations(TorchDispatchMode):
    """What a pass allocates, by storage, and whether it is zeroed; `others` counts operations that neither allocate nor view."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, bool]] = {}
        self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.made[_storage(result)] = result, func is _aten.zeros.default
        else:
            self.others += not func.is_view
        return result


class _Memory:
    """Where the tensors of a recorded call lie: at which byte of which slot. Slots are the inputs, the outputs, and workspaces for
    all else that the call made.

    Tensors that are none of these were there before, like Hadamard signs: their addresses stay, and `kept` keeps them alive.
    """

    def __init__(self, inputs: list[Tensor], outputs: tuple[Tensor, ...], made: dict[int, tuple[Tensor, bool]]):
        self.kept: list[Tensor] = []
        self._inputs = {id(x): slot for slot, x in enumerate(inputs)}
        self._alive = inputs  # so that no other tensor has the identity of one
        storages = [_storage(x) for x in inputs]
        self._shared = {storage for storage in storages if storages.count(storage) > 1}
        self._bases = {storage: (slot, inputs[slot].data_ptr()) for slot, storage in enumerate(storages)}
        if len(self._inputs) < len(inputs):
            raise Unrepeatable("one tensor is two inputs")
        inner = dict(made)
        self.makers = []
        for slot, x in enumerate(outputs, len(inputs)):
            _, zeroed = inner.pop(_storage(x), (None, None))
            if zeroed is None or x.storage_offset():
                raise Unrepeatable("an output is no new tensor")
            self._bases[_storage(x)] = slot, x.data_ptr()
            self.makers.append(_maker_of(x, zeroed))
        for wanted in (False, True):
            tensors = [x for x, zeroed in inner.values() if zeroed is wanted]
            together = sum(map(_bytes, tensors)) <= WORKSPACE_BYTES
            for sections in [tensors] if together else [[x] for x in tensors]:
                self._add_workspace(sections, wanted, len(inputs) + len(self.makers))

    def _add_workspace(self, tensors: list[Tensor], zeroed: bool, slot: int) -> None:
        size = 0
        for x in tensors:
            self._bases[_storage(x)] = slot, x.data_ptr() - size
            size += _bytes(x)
        if not size:
            return
        device = tensors[0].device
        if zeroed:  # a fill of words is faster than one of bytes
            self.makers.append(lambda: torch.zeros(size // 4, dtype=torch.float32, device=device))
        else:
            self.makers.append(lambda: torch.empty(size, dtype=torch.uint8, device=device))

    def place(self, x: Tensor) -> tuple[int, int] | None:
        """Slot and byte; None: at its address for good."""
        if not x.numel():  # its address is 0
            return None
        slot, storage = self._inputs.get(id(x)), _storage(x)
        if slot is not None:
            return slot, 0
        if storage in self._shared:
            raise Unrepeatable("a part of which input is not clear")
        if storage not in self._bases:
            self.kept.append(x)
            return None
        slot, base = self._bases[storage]
        return slot, x.data_ptr() - base


def _maker_of(x: Tensor, zeroed: bool) -> Callable[[], Tensor]:
    shape, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device
    if zeroed:
        return lambda: torch.zeros(shape, dtype=dtype, device=device)
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Launch:
    """A launch with places for addresses among its arguments."""

    def __init__(self, launched: Launched, memory: _Memory):
        self.launch, self.arguments = launcher.repeatable(launched)
        self.owner = launched.compiled.owner  # keeps the code loaded, also where Triton forgets it
        self.pointers: list[tuple[int, int, int]] = []  # place among the arguments, slot, byte
        self.descriptors: list[tuple[int, int, int, Callable[[int], Any], dict[int, Any]]] = []
        for place, x in enumerate(self.arguments):
            described = type(x) is Described
            tensor = x.base if described else x
            if not isinstance(tensor, Tensor):
                continue
            self.arguments[place] = None  # keeps no memory of the recorded call
            found = memory.place(tensor)
            if found is None:
                self.arguments[place] = x.at(tensor.data_ptr()) if described else tensor.data_ptr()
            elif described:
                self.descriptors.append((place, *found, x.at, {}))
            else:
                self.pointers.append((place, *found))

    def __call__(self, stream: int, addresses: list[int]) -> None:
        arguments = self.arguments.copy()
        for place, slot, byte in self.pointers:
            arguments[place] = addresses[slot] + byte
        for place, slot, byte, at, known in self.descriptors:
            address = addresses[slot] + byte
            made = known.get(address)
            if made is None:
                if len(known) >= TENSOR_MAPS:
                    known.clear()
                known[address] = made = at(address)
            arguments[place] = made
        self.launch(stream, arguments)


class Plan:
    """What a recorded call did, for inputs of the same signature."""

    def __init__(self, inputs: list[Tensor], outputs: tuple[Tensor, ...], made: dict, launches: list[Launched]):
        memory = _Memory(inputs, outputs, made)
        self.launches = [_Launch(launched, memory) for launched in launches]
        self.makers, self.kept, self.returned = memory.makers, memory.kept, len(outputs)
        self.hooks = [launched.kernel.pre_run_hooks for launched in launches]

    def run(self, addresses: list[int]) -> tuple[Tensor, ...]:
        """The outputs, from the addresses of the inputs."""
        made = [make() for make in self.makers]
        addresses += [x.data_ptr() for x in made]
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for launch in self.launches:
            launch(stream, addresses)
        return tuple(made[: self.returned])


_OPTIONS = frozenset((type(None), bool, int, float, torch.dtype))
"""Types of inputs that are no tensors."""

_TYPES = _OPTIONS | {Tensor, torch.nn.Parameter}
"""Types of inputs that are looked at; others, as tensor subclasses, run as written."""


def _signature(inputs: tuple) -> tuple[tuple, list[int]]:
    """What a plan holds for, and what it does not: the addresses of the tensors. Whether they are aligned is compiled in."""
    addresses = [x.data_ptr() for x in inputs if type(x) not in _OPTIONS]
    signature = [
        x if type(x) in _OPTIONS else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for x in inputs
    ]
    return tuple(signature), addresses


def _record(run: Callable, inputs: tuple) -> tuple[tuple[Tensor, ...], Plan | None]:
    """Run a pass; its outputs, and its plan if it has one."""
    with launcher.recording() as launches, _Allocations() as allocations:
        outputs = run(*inputs)
    direct = [launched for launched in launches if launched is not None]
    if allocations.others or len(direct) < len(launches):
        return outputs, None
    try:
        return outputs, Plan([x for x in inputs if isinstance(x, Tensor)], outputs, allocations.made, direct)
    except Unrepeatable:
        return outputs, None


_plans: list[dict[tuple, Plan | int]] = []  # of every repeated pass: by signature, a plan or how often there came none


def repeated(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`run`, which launches kernels and allocates, but neither reads tensors nor runs other operations, repeated from plans.

    Where Triton's launches are not followed (`launcher`), or somebody listens to them, every call runs as written.
    """
    plans: dict[tuple, Plan | int] = {}
    _plans.append(plans)

    @wraps(run)
    def call(*inputs):
        if not launcher.follows() or not _TYPES.issuperset(map(type, inputs)):
            return run(*inputs)
        signature, addresses = _signature(inputs)
        plan = plans.get(signature, 0)
        if isinstance(plan, Plan):
            if any(plan.hooks):
                return run(*inputs)
            try:
                return plan.run(addresses)
            except torch.OutOfMemoryError:  # of its allocations, which come first; as written a pass may do with less
                return run(*inputs)
        if plan >= ATTEMPTS:
            return run(*inputs)
        outputs, made = _record(run, inputs)
        if len(plans) >= SIGNATURES:
            plans.clear()
        plans[signature] = plan + 1 if made is None else made
        return outputs

    return call


def forget() -> None:
    """Drop all plans: after a change of what they were made with, such as a table of launch shapes."""
    for plans in _plans:
        plans.clear()
