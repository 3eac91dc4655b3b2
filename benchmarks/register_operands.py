"""Operands in registers that machine code overwrites while an asynchronous product may still read them.

ptxas of CUDA 12.9 is known to do so on Hopper (triton#11781); the one of CUDA 13.3 is mended. Instructions are
taken in program order, without branches.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

OPERAND_REGISTERS = 4
"""Of a product's left operand, per thread: 64 rows of 32 bytes over 128 threads."""

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", re.MULTILINE)


class Product(NamedTuple):
    """A product under way whose left operand lies in registers."""

    address: str
    registers: set[int]
    group: int  # number of the group that it is committed with


def disassembled(cubin: bytes, folder: Path, nvdisasm: Path) -> str:
    """Machine code of a compiled kernel as text."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout


def overwritten(text: str) -> list[str]:
    """Instructions that write a register of an operand between its product and the wait for its group."""
    pending: list[Product] = []
    group, found = 0, []
    for address, name, rest in INSTRUCTION.findall(text):
        operands = [x.strip() for x in re.split(r",(?![^\[]*\])", rest)] if rest else []
        if name.startswith(("QGMMA", "HGMMA")):
            if left := re.match(r"R(\d+)", operands[1]):
                first = int(left[1])
                pending.append(Product(address, set(range(first, first + OPERAND_REGISTERS)), group))
            group += "gsb0" in rest
        elif name.startswith("WARPGROUP.DEPBAR"):
            allowed = int(operands[-1], 16)
            pending = [product for product in pending if product.group >= group - allowed]
        else:
            lost = written(name, operands)
            hit = [product.address for product in pending if product.registers & lost]
            found += [f"{address}: {name} {rest} (operand of {', '.join(hit)})"] if hit else []
    return found


def written(name: str, operands: list[str]) -> set[int]:
    """Registers that an instruction other than a product writes."""
    if name.startswith(("ST", "RED", "BAR", "R2UR", "SYNCS", "UTMA")):
        return set()
    targets = [x for x in operands[:2] if not re.match(r"!?U?P", x)][:1]
    target = re.match(r"R(\d+)", targets[0]) if targets else None
    if target is None:
        return set()
    wide = ".64" in name or ".WIDE" in name or name == "CS2R"
    n_registers = 4 if ".128" in name or name.endswith(".4") else 2 if wide else 1
    return set(range(int(target[1]), int(target[1]) + n_registers))
