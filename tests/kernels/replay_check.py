"""A process of its own, without Triton's interpreter: what attention launches as it runs, and repeated from plans, is the same.

Prints a JSON object: case → what differs, or null.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, fused, hopper, launcher, replay
from hf_geoscale.kernels.counters import length_of
from tests.kernels import stubbed_launches as stubs

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": 32},
    "rotary, dim 80": {"dim": 80, "rotary": 40},
    "dS stored": {"dim": 128, "rotary": 64},
    "packed": {"packed": True, "rotary": 32},
    "norms": {"norms": True, "rotary": 32},
    "window": {"window": 20},
    "key ranges": {"ranges": True},
    "no statistics": {"count": False},
    "counters that lie ready": {"ready": True},
    "unaligned": {"shift": 1},
    "heads first": {"heads_first": True},
    "two groups of rows": {"rows": 2100},
    "float32": {"dtype": torch.float32},
    "no mix": {"incoherent": False},
    "not causal": {"causal": False},
    "more keys": {"keys": 130},
    "high": {"precision": "high"},
    "dropout": {"dropout_p": 0.0005, "dropout_seed": torch.tensor(5)},
    "soft cap": {"softcap": 5.0},
    "observed": {"observe": True},
    "quantised logits": {"logits": True},
}


class Pass(NamedTuple):
    inputs: tuple
    outputs: tuple[Tensor, ...]
    launches: list[stubs.Given]

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.inputs, *self.outputs) if isinstance(x, Tensor)]


passes: list[Pass] = []


def draw(*shape: int, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers, `shift` entries off an aligned address."""
    return torch.rand(8 + shift + torch.Size(shape).numel()).to(dtype)[8 + shift :].view(shape)


def attend(
    rows=70, keys=None, dim=64, packed=False, rotary=0, norms=False, ranges=False, count=True, observe=False, logits=False, shift=0,
    dtype=torch.bfloat16, heads_first=False, ready=False, **options,
) -> list[Pass]:  # fmt: skip
    """Both passes of one call, with operands at new addresses."""
    counts = (4, 2, 2)
    lengths = (rows, keys or rows, keys or rows)
    if packed:
        options["packed"] = draw(2, rows, sum(counts) * dim).requires_grad_()
        operands = options["packed"].unflatten(2, (-1, dim)).transpose(1, 2).split(counts, dim=1)
    else:
        operands = [draw(2, n, c, dim, shift=shift, dtype=dtype) for n, c in zip(lengths, counts, strict=True)]
        operands = [
            (x.transpose(1, 2).contiguous() if heads_first else x.transpose(1, 2)).requires_grad_() for x in operands
        ]
    scales = draw(sum(counts), dtype=torch.float32).split(counts)  # one storage, as a refresh leaves them
    options |= dict(zip(("q_quant_scale", "k_quant_scale", "v_quant_scale"), scales, strict=True))
    if rotary:
        options["rotary"] = tuple(draw(1, rows, 2 * rotary)[..., :rotary] for _ in range(2))
    if norms:
        options["qk_norm"] = draw(dim).requires_grad_(), draw(dim).requires_grad_(), 1e-6
    if ranges:
        options["key_range"] = torch.tensor([3, 60], dtype=torch.int32).repeat(2, rows, 1)
    if logits:
        options["logit_quant_scale"] = draw(counts[0], dtype=torch.float32)
    options["statistics"] = AttentionStatistics(observe_logits=observe) if count else None
    if ready:
        options["statistics"]._spare = torch.zeros(length_of(2, 4, 2, True, observe), dtype=torch.float32), 0
    before = len(passes)
    out = fp8_attention(*operands, backend="triton", **options)
    out.backward(draw(*out.transpose(1, 2).shape).to(out.dtype).transpose(1, 2))
    return passes[before:]


def spied(run: Callable) -> Callable:
    def call(*inputs):
        before = len(stubs.launches)
        outputs = run(*inputs)
        passes.append(Pass(inputs, outputs, stubs.launches[before:]))
        return outputs

    return call


class Comparison:
    """Of a pass as it ran with the same pass repeated: everything but addresses is equal, and those belong to the same tensors."""

    def __init__(self, run: Pass, repeated: Pass):
        self.pairs = list(zip(run.tensors(), repeated.tensors(), strict=True))
        self.sections: dict[
            int, tuple[int, int]
        ] = {}  # storage of the run → where it starts when repeated, and its bytes
        for x, y in self.pairs:
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), (x.shape, x.stride(), y.stride())
        assert len(run.launches) == len(repeated.launches), "not as many launches"
        for x, y in zip(run.launches, repeated.launches, strict=True):
            assert (x.grid, x.function, len(x.arguments)) == (y.grid, y.function, len(y.arguments)), (x, y)
            for a, b, *contents in zip(x.arguments, y.arguments, x.contents, y.contents, strict=True):
                self.compare(a, b, *contents)
        spans = [(start, start + size) for start, size in self.sections.values()]
        spans += [(y.data_ptr(), y.data_ptr() + y.element_size()) for y in repeated.tensors() if y.numel()]
        spans = sorted(set(spans))
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "tensors overlap"

    def compare(self, a: Any, b: Any, before: bytes, after: bytes) -> None:
        if isinstance(a, stubs.Map):
            assert a.fields == b.fields, (a.fields, b.fields)
        elif hasattr(a, "block_shape"):
            mine, theirs = ({n: v for n, v in vars(x).items() if n != "base"} for x in (a, b))
            assert (type(a), mine) == (type(b), theirs)
        elif not isinstance(a, Tensor):
            assert (type(a), a) == (type(b), b), (a, b)
            return
        base = a if isinstance(a, Tensor) else a.base
        self.compare_places(base, b if type(b) is int else stubs.address(b), before, after)

    def compare_places(self, x: Tensor, address: int, before: bytes, after: bytes) -> None:
        if not x.numel():
            assert address == 0
            return
        assert address % 16 == x.data_ptr() % 16, "another alignment"
        storage = x.untyped_storage()
        same = [pair for pair in self.pairs if pair[0] is x]
        same = same or [pair for pair in self.pairs if pair[0].untyped_storage()._cdata == storage._cdata]
        if same:
            (mine, theirs), *others = same
            assert not others
            assert address - theirs.data_ptr() == x.data_ptr() - mine.data_ptr(), "another tensor"
        elif address != x.data_ptr():  # else it was there before
            place = address - x.data_ptr() + storage.data_ptr(), storage.nbytes()
            assert self.sections.setdefault(storage._cdata, place) == place, "a part of another section"
            assert before == after, ("zeroed before or after only", before, after)


def plans() -> list[replay.Plan]:
    return [plan for table in replay._plans for plan in table.values() if isinstance(plan, replay.Plan)]


def tensors_of(x: Any) -> list[Tensor]:
    """Tensors that an object keeps alive, itself or in its attributes, entries, closures and bound arguments."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        parts = list(x.values())
    elif isinstance(x, (list, tuple)):
        parts = list(x)
    elif isinstance(x, FunctionType):
        parts = [cell.cell_contents for cell in x.__closure__ or ()]
    elif isinstance(x, partial):
        parts = [x.func, x.args]
    else:
        parts = list(vars(x).values()) if isinstance(x, (replay.Plan, replay._Launch)) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def check(case: dict[str, Any]) -> None:
    launcher._FOLLOWED = False
    kept = [attend(**case)]
    launcher._FOLLOWED = True
    for _ in range(replay.ATTEMPTS):
        kept.append(attend(**case))
    through = stubs.ordinary()
    sizes = []
    for default in (torch.float32, torch.bfloat16):  # the second as while somebody loads a model in bfloat16
        torch.set_default_dtype(default)
        kept.append(attend(**case))
        sizes.append([make().nbytes for plan in plans() for make in plan.makers])
        torch.set_default_dtype(torch.float32)
        assert sizes[0] == sizes[-1], "workspaces of another size"
        assert [len(p) for p in kept[-1]] == [len(p) for p in kept[0]]
        for run, repeated in zip(kept[0], kept[-1], strict=True):
            pointers = [a for given in repeated.launches for a in given.arguments if isinstance(a, Tensor)]
            assert not pointers, "launched as it runs"
            Comparison(run, repeated)
    assert stubs.ordinary() == through
    assert len(kept[-1][0].outputs) == 8 - case.get("ready", False), "counters of its own"
    assert not [x for plan in plans() for x in tensors_of(plan) if not any(x is y for y in plan.kept)], (
        "a plan keeps tensors"
    )
    hooks = next(kernel.kernel.pre_run_hooks for kernel in stubs.KERNELS if kernel.kernel.name == "quantize_kernel")
    hooks.append(print)
    attend(**case)
    hooks.clear()
    assert stubs.ordinary() > through, "a kernel's hook was passed over"


def report(kind: str, on_hopper: bool) -> dict[str, str | None]:
    stubs.install(kind)
    hopper.runs = lambda device, dim: on_hopper and hopper.launch is not None and dim in hopper.launch.TABLE
    replay.WORKSPACE_BYTES = 2**20 if on_hopper else 0
    found = {}
    for name, case in CASES.items():
        try:
            check(case)
            found[name] = None
        except AssertionError as error:
            place = error.__traceback__
            while place.tb_next:
                place = place.tb_next
            found[name] = f"line {place.tb_lineno}: {error}"[:300]
        passes.clear()
        stubs.launches.clear()
    return found


if __name__ == "__main__":
    if not launcher._FOLLOWED:
        sys.exit("skip: launches of this Triton are not followed")
    stubs.poison()
    for name in ("_forward", "_forward_into", "_backward_pass"):
        setattr(fused, name, spied(getattr(fused, name)))
    kinds = [(kind, on_hopper) for kind in stubs.LAUNCHERS for on_hopper in (True, False)]
    print(json.dumps({f"{kind}, {'Hopper' if h else 'portable'}": report(kind, h) for kind, h in kinds}))
