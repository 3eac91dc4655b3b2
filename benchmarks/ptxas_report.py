"""Registers, spills and serialised products of every kernel, as ptxas reports them for one Hopper GPU. Needs no GPU.

Each case runs both passes of the op on CPU tensors, with every launch replaced by a compilation for compute capability 9.0.
The ptxas that the installed Triton brings along, with Triton's own options, does the work.

    python benchmarks/ptxas_report.py                          # cases of the speed benchmark, D 64 and 128
    python benchmarks/ptxas_report.py --case 'D 128 causal' --kernel key_gradient
    python benchmarks/ptxas_report.py --every                  # every mode, and the portable kernels
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from register_operands import disassembled, overwritten
from triton.backends.compiler import GPUTarget

from hf_geoscale.kernels import hopper, launch, passes, tiles
from hf_geoscale.kernels.launcher import DirectKernel

CAPABILITY = 90
LENGTH = 4096
WINDOW = 1024
HEADS, KV_HEADS = 32, 8
SHAPE_ARGUMENTS = "BM", "BN", "BLOCK", "STAGES", "CONSUMERS", "num_warps", "maxnreg"
"""Compile-time arguments that make up a launch shape."""

COLUMNS = (
    "case",
    "kernel",
    "launch shape",
    "registers",
    "spill bytes",
    "stack",
    "shared",
    "products",
    "overwritten",
    "warnings",
)


@dataclass(frozen=True)
class Case:
    """One call of the op. Defaults are those of the speed benchmark."""

    dim: int = 128
    hopper: bool = True
    causal: bool = True
    window: int = 0  # 0: none
    ranges: bool = False
    rotary: bool = False
    incoherent: bool = True
    norm: bool = False
    high: bool = False
    dropout: bool = False
    softcap: bool = False
    logits: bool = False
    count: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        given = asdict(self)
        words = [name for name in given if given[name] is True and name not in ("hopper", "incoherent")]
        words += ["plain"] if not self.incoherent else []
        words += [f"window {self.window}"] if self.window else []
        words += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.bfloat16 else []
        return " ".join([f"D {self.dim}", *words, "" if self.hopper else "(portable)"]).strip()


@dataclass(frozen=True)
class Finding:
    """What ptxas says about one compiled kernel. Sizes are in bytes, `registers` per thread."""

    case: str
    kernel: str
    shape: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    products: int  # wgmma instructions in the PTX
    overwritten: list[str]  # writes to an operand of a product under way: a fault of ptxas
    warnings: list[str] = field(default_factory=list)  # of serialised products, C75xx

    def cells(self) -> list[str]:
        spills = f"{self.spill_stores} + {self.spill_loads}" if self.spill_stores or self.spill_loads else "0"
        numbers = self.registers, spills, self.stack, self.shared, self.products, len(self.overwritten)
        return [self.case, self.kernel, self.shape, *map(str, numbers), " ".join(self.warnings) or "–"]


class Hopper:
    """Triton's driver of a Hopper GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compilations:
    """Replaces every launch by a compilation, and keeps the finding of each."""

    def __init__(self, kernels: re.Pattern[str], folder: Path):
        self.kernels, self.folder, self.case, self.findings = kernels, folder, "", list[Finding]()
        self.nvdisasm = Path(triton.knobs.nvidia.nvdisasm.path)

    def launch(self, kernel: DirectKernel, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """In the place of `DirectKernel._launch`."""
        name = kernel.__name__
        if not self.kernels.search(name):
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.kernel.warmup(*arguments, grid=grid, **options)
        text = log.getvalue()
        if not text:  # compiled before
            return
        bound = dict(zip((p.name for p in kernel.params), arguments, strict=False)) | options
        shape = " ".join(f"{key} {bound[key]}" for key in SHAPE_ARGUMENTS if bound.get(key) is not None)
        self.findings.append(
            Finding(
                self.case,
                name,
                shape,
                registers=most(r"Used (\d+) registers", text),
                spill_stores=most(r"(\d+) bytes spill stores", text),
                spill_loads=most(r"(\d+) bytes spill loads", text),
                stack=most(r"(\d+) bytes stack frame", text),
                shared=compiled.metadata.shared,
                products=compiled.asm["ptx"].count("wgmma.mma_async"),
                overwritten=overwritten(disassembled(compiled.asm["cubin"], self.folder, self.nvdisasm)),
                warnings=sorted(set(re.findall(r"\bC75\d\d\b", text))),
            )
        )


def most(pattern: str, text: str) -> int:
    """Largest number that a pattern finds in a log of ptxas."""
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise ValueError(f"the log of ptxas has no line like {pattern!r}:\n{text}")
    return max(found)


def cases(every: bool) -> list[Case]:
    """Cases of the speed benchmark; with `every`, each mode of the Hopper kernels and of the portable ones."""
    usual = [Case(dim) for dim in (128, 64)]
    if not every:
        return usual
    for dim in (128, 64):
        usual += [Case(dim, causal=False), Case(dim, window=WINDOW), Case(dim, ranges=True), Case(dim, rotary=True)]
        usual += [Case(dim, ranges=True, causal=False), Case(dim, incoherent=False)]
    usual += [Case(80), Case(128, rotary=True, norm=True, count=True), Case(128, dtype=torch.float16)]
    for dim in (32, 64, 128, 256):
        usual += [Case(dim, hopper=False), Case(dim, hopper=False, causal=False)]
        usual += [Case(dim, hopper=False, high=True), Case(dim, hopper=False, ranges=True)]
    for dim in (64, 128):
        for mode in ("dropout", "softcap", "logits", "count"):
            usual.append(Case(dim, hopper=False, **{mode: True}))
    return usual


def run(case: Case) -> None:
    """Both passes of the op, on empty tensors."""
    shapes = [(1, heads, LENGTH, case.dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.empty(b, length, h, d, dtype=case.dtype).transpose(1, 2) for b, h, length, d in shapes)
    scales = [torch.empty(heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    angles = torch.empty(1, LENGTH, case.dim // 2) if case.rotary else None
    norms = [torch.empty(case.dim), torch.empty(case.dim)] if case.norm else [None, None]
    shared = {
        "key_range": torch.zeros(1, LENGTH, 2, dtype=torch.int32) if case.ranges else None,
        "dropout_seed": torch.zeros((), dtype=torch.int64) if case.dropout else None,
        "gradient_overflow": torch.zeros(1, dtype=torch.int64) if case.count else None,
        "logit_quant_scale": torch.empty(HEADS) if case.logits else None,
        "cos": angles,
        "sin": angles,
        "interleaved": False,
        "softmax_scale": case.dim**-0.5,
        "softcap": 30.0 if case.softcap else 0.0,
        "causal": case.causal,
        "window": case.window,
        "dropout_p": 0.1 if case.dropout else 0.0,
        "incoherent": case.incoherent,
    }
    own = {"high": case.high, "count": case.count, "observe": case.count and not case.hopper}
    saved = passes.forward(q, k, v, *scales, **shared, **own, q_norm=norms[0], k_norm=norms[1], norm_eps=1e-6)
    named = {"query": q, "key": k, "q_norm": norms[0], "k_norm": norms[1]} if case.norm else {}
    if case.hopper:
        shared["gradient_overflow"] = None  # counted by the portable kernels alone
    dtypes = (case.dtype,) * 3
    grad = torch.empty_like(q)
    passes.backward(grad, *saved, *scales, *shared.values(), False, *dtypes, **named, norm_eps=1e-6)


def use_case_kernels(case: Case) -> None:
    """Choose kernels and tiles as on one H200, though tensors are on the CPU."""
    passes.hopper.is_hopper = lambda device: case.hopper
    launch.tiles_for = lambda device, dim, high: tiles.TABLE.get(
        (tiles.H100, tiles.padded_head_dim(dim), high), tiles.DEFAULTS[tiles.padded_head_dim(dim)]
    )


def table(findings: list[Finding]) -> str:
    """Aligned columns."""
    rows = [list(COLUMNS), *(finding.cells() for finding in findings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def assembler() -> str:
    """Release of the ptxas that Triton calls for Hopper."""
    from triton.backends.nvidia.compiler import get_ptxas

    done = subprocess.run([get_ptxas(CAPABILITY).path, "--version"], capture_output=True, text=True, check=True)
    return re.findall(r"\bV(\d\S*)", done.stdout)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="every mode, and the portable kernels (minutes)")
    parser.add_argument("--case", default="", help="regular expression that the name of a case must match")
    parser.add_argument("--kernel", default="", help="regular expression that the name of a kernel must match")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    if hopper.launch is None:
        sys.exit(f"Triton {triton.__version__} has no Gluon for Hopper")
    triton.runtime.driver.set_active(Hopper())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as folder:
        compilations = Compilations(re.compile(options.kernel), Path(folder))
        DirectKernel._launch = lambda kernel, *arguments, **given: compilations.launch(kernel, *arguments, **given)
        for case in (x for x in cases(options.every) if re.search(options.case, x.name)):
            compilations.case = case.name
            use_case_kernels(case)
            run(case)
    if options.json:
        for finding in compilations.findings:
            print(json.dumps(asdict(finding) | {"triton": triton.__version__, "ptxas": assembler()}))
        return
    print(f"Triton {triton.__version__}, ptxas {assembler()}, compute capability {CAPABILITY / 10}\n")
    print(table(compilations.findings))


if __name__ == "__main__":
    main()
