"""Error of FP8 attention against float64 where sums grow with the length: ours, the specification, and other libraries.

    python benchmarks/sums.py --output docs/sums.jsonl              # measure; a run that was cut off continues when called again
    python benchmarks/sums.py --report docs/sums.jsonl              # docs/sums.md between its markers, and docs/sums.png

An older package is measured by this script, too:

    GEOSCALE_COMMIT=2046942 PYTHONPATH=older python benchmarks/sums.py --label before \
        --implementations "hf_geoscale FP8" --forms causal --output docs/sums.jsonl

Two query heads, one key/value head, causal. Scales of FP8 operands come from 1.5 × the largest row norm, as a
certificate leaves them. Other libraries quantise with the amax of a tensor. A record holds relative errors of O, of
the last 512 rows of O, and of dQ, dK and dV. Parts of a run: --cases, --forms, --dims, --lengths, --implementations.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from coherent import CASES, FORMS, NAMES, draw, exact, masked, relative, spans
from host import environment
from records import append, read
from torch import Tensor

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import visibility
from hf_geoscale.kernels.backend import TRITON_INSTALLED
from hf_geoscale.scaling import E4M3

LENGTHS = (1024, 4096, 8192, 32768, 131072)
DIMS = (128, 64)
HEADS, KV_HEADS = 2, 1
LAST = 512
LONGEST_OF_OTHER_FORMS = 32768
"""Windows, documents and padding shorten rows; the longest sequence is measured without them."""

SPECIFICATION_ROWS = 512
"""Query rows that the specification handles at a time here: eight times its own, for a GPU's sake."""

Problem = tuple[list[Tensor], dict[str, Any]]  # q, k, v, dO, and options of `fp8_attention`
Results = list[Tensor | None]


def quant_scale(x: Tensor) -> Tensor:
    """Per-head factor from 1.5 × the largest row norm: (H,)."""
    return E4M3.max / (1.5 * x.detach().float().norm(dim=-1).amax((0, 2)))


def ours(problem: Problem, backend: str = "triton", precision: str = "standard") -> Results:
    """O, dQ, dK, dV of `fp8_attention`."""
    (*leaves, grad), options = problem
    scales = {f"{name}_quant_scale": quant_scale(x) for name, x in zip("qkv", leaves, strict=True)}
    out = fp8_attention(*leaves, **scales, **options, backend=backend, precision=precision)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@contextmanager
def portable_kernels() -> Iterator[None]:
    """Calls take the portable kernels, on Hopper GPUs too."""
    from hf_geoscale.kernels import passes, replay

    before, passes.hopper.launches_for = passes.hopper.launches_for, lambda *_, **__: None
    replay.forget()
    try:
        yield
    finally:
        passes.hopper.launches_for = before
        replay.forget()


def portable(problem: Problem) -> Results:
    with portable_kernels():
        return ours(problem)


def specification(problem: Problem, precision: str = "standard") -> Results:
    before, visibility.ROW_BLOCK = visibility.ROW_BLOCK, SPECIFICATION_ROWS
    try:
        return ours(problem, "reference", precision)
    finally:
        visibility.ROW_BLOCK = before


def rival(problem: Problem, name: str) -> Results:
    """Another library's, on causal attention."""
    from cudnn_fp8 import CudnnFp8
    from rivals import Fa3, SdpaCudnn, Shape

    kinds = {"FlashAttention-3 FP8": partial(Fa3, fp8=True), "cuDNN FP8": CudnnFp8, "SDPA BF16": SdpaCudnn}
    q, k, v, grad = problem[0]
    shape = Shape(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[3])
    return list(kinds[name](q, k, v, grad, shape).result())


RIVALS = ("FlashAttention-3 FP8", "cuDNN FP8", "SDPA BF16")
"""Left out where they are not installed, or do not run."""

OF_EVERY_FORM = {"hf_geoscale FP8": ours, "specification": specification}
"""The others are measured on causal attention alone: each form would be compiled anew."""

IMPLEMENTATIONS: dict[str, Callable[[Problem], Results]] = {
    **OF_EVERY_FORM,
    "hf_geoscale FP8, high": partial(ours, precision="high"),
    "specification, high": partial(specification, precision="high"),
    "hf_geoscale FP8, portable": portable,
    **{name: partial(rival, name=name) for name in RIVALS},
}


def errors(results: Results, truth: list[Tensor]) -> dict[str, float | None]:
    """Relative errors of O, of its last rows, and of the gradients; None for a gradient that there is not."""
    pairs = dict(zip(NAMES, zip(results, truth, strict=True), strict=True))
    pairs["last"] = tuple(None if x is None else x[:, :, -LAST:] for x in pairs["O"])
    return {name: None if x is None else relative(x, y) for name, (x, y) in pairs.items()}


def key(record: dict[str, Any]) -> tuple:
    """Of records of which the last counts."""
    return tuple(record[x] for x in ("label", "case", "form", "dim", "length", "implementation", "seed"))


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Problems, short ones first, as the beginning of their records, and the implementations that they are for."""
    for length, form, dim, case in product(arguments.lengths, arguments.forms, arguments.dims, arguments.cases):
        causal = form == "causal"
        if causal or length <= LONGEST_OF_OTHER_FORMS:
            problem = {"label": arguments.label, "case": case, "form": form, "dim": dim, "length": length}
            names = [name for name in arguments.implementations if causal or name in OF_EVERY_FORM]
            yield problem | {"seed": arguments.seed, "heads": [HEADS, KV_HEADS]}, names


def result(name: str, problem: Problem) -> Results | None:
    """None, and a line that says why, where another library does not run."""
    if name not in RIVALS:
        return IMPLEMENTATIONS[name](problem)
    try:
        return IMPLEMENTATIONS[name](problem)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        print(f"{name} is left out: {first_line(error)}", flush=True)
        return None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def measure(arguments: argparse.Namespace) -> None:
    """Append a record for each problem and implementation that the output does not have from this commit and GPU."""
    host, device, path = environment("fa3-fwd", "nvidia-cudnn-frontend"), arguments.device, arguments.output
    before = read(path) if path and path.exists() else []
    done = {key(r) for r in before if all(r["environment"][x] == host[x] for x in ("gpu", "commit"))}
    for here, names in wanted(arguments):
        names = [name for name in names if key({**here, "implementation": name}) not in done]
        if not names:
            continue
        case, form, dim, length = (here[x] for x in ("case", "form", "dim", "length"))
        tensors, options = (
            draw(case, length, dim, HEADS, KV_HEADS, 1, arguments.seed, device),
            masked(form, length, device),
        )
        truth = exact(*tensors, spans(length, device, **options))
        for name in names:
            results = result(name, (tensors, options))
            if results is None:
                continue
            found = errors(results, truth)
            print(f"{case}, {form}, D {dim}, L {length}, {name}: {_shown(found)}", flush=True)
            if path:
                append(path, [{**here, "implementation": name, **found, "environment": host}])


def _shown(found: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'–' if error is None else f'{error:.4f}'}" for name, error in found.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON lines to append to; default: print only")
    parser.add_argument("--report", type=Path, help="make page and figure of these JSON lines instead of measuring")
    parser.add_argument("--label", default="now", help='"before" for an older package; default: %(default)s')
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.report:
        from sums_report import write

        write(read(arguments.report), arguments.report)
        return
    if not TRITON_INSTALLED:
        sys.exit("the kernels need Triton")
    measure(arguments)


if __name__ == "__main__":
    main()
