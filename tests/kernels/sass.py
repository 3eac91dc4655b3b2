"""Bytes that machine code stores though nothing computed them, found by reading its disassembly.

Instructions are taken in program order, without loops and branches. A register is undefined until an
instruction writes it. A result is undefined where an operand was. Permutations, masks and shifts are
followed byte by byte: compilers build words from undefined and defined bytes on purpose. Spilled registers
count as defined when they come back.
"""

import re
import subprocess
from pathlib import Path

WORD = (False,) * 4
"""Which bytes of a register are undefined, lowest first."""

UNDEFINED = (True,) * 4

STORES = "STG", "STS", "ST", "RED", "ATOM", "ATOMG", "ATOMS"
NO_RESULT = (
    "BAR",
    "BRA",
    "BSSY",
    "BSYNC",
    "CALL",
    "CCTL",
    "ERRBAR",
    "EXIT",
    "FENCE",
    "LDGDEPBAR",
    "MEMBAR",
    "NOP",
    "R2UR",
)
NO_RESULT += (
    "RET",
    "STL",
    "SYNCS",
    "UBLKCP",
    "WARPGROUP",
    "WARPSYNC",
    "YIELD",
    "DEPBAR",
    "LDGSTS",
    "STSM",
    "KILL",
    "BREAK",
)

SHIFTS_LEFT = {
    "IMAD.U32": {"0x10000": 2},
    "IMAD.SHL.U32": {"0x100": 1, "0x10000": 2, "0x1000000": 3},
    "SHF.L.U32": {"0x8": 1, "0x10": 2, "0x18": 3},
}
"""Whole bytes that an instruction shifts by, as its second operand says."""

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", re.MULTILINE)
REGISTER = re.compile(r"\bR(\d+)\b")


def disassembled(cubin: Path, nvdisasm: Path) -> str:
    return subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout


def undefined_stores(text: str) -> list[str]:
    """Instructions that store an undefined byte."""
    registers: dict[int, tuple[bool, ...]] = {}
    found = []

    def read(operand: str) -> tuple[bool, ...]:
        match = REGISTER.search(operand)
        word = registers.get(int(match[1]), UNDEFINED) if match else WORD
        for half, bytes_ in ((".H0", slice(0, 2)), (".H1", slice(2, 4))):
            if half in operand:
                return (any(word[bytes_]),) * 4
        return word

    for name, rest in INSTRUCTION.findall(text):
        operation, *_ = name.split(".")
        operands = [x.strip() for x in re.split(r",(?![^\[]*\])", rest)] if rest else []
        if operation in STORES:
            if any(stored_bytes(name, operands[-1], registers)):
                found.append(f"{name} {rest}")
            operands = operands[:-1] if operation.startswith("ATOM") else []
        if operation in NO_RESULT or not operands:
            continue
        if re.match(r"!?U?P", operands[0]):  # a predicate comes first
            operands = operands[1:]
        target = REGISTER.match(operands[0]) if operands else None
        if target is None:
            continue
        sources = operands[1:]
        if operation == "PRMT":
            result = permuted(read(sources[0]), sources[1], read(sources[2]))
        elif operation == "LOP3" and "0xc0" in sources:
            result = masked(read(sources[0]), sources[1], read(sources[1]))
        elif name == "SHF.R.U32.HI" and re.fullmatch(r"0x\w+", sources[1]) and sources[0] == "RZ":
            first = int(sources[1], 16) // 8
            result = (read(sources[2])[first:] + WORD)[:4]
        elif name in SHIFTS_LEFT and sources[1] in SHIFTS_LEFT[name]:
            n_bytes = SHIFTS_LEFT[name][sources[1]]
            result = (WORD[:n_bytes] + read(sources[0]))[:4]
        elif "PACK_AB_MERGE_C" in name:
            converted = any(read(sources[0]) + read(sources[1]))
            result = (converted, converted, *read(sources[2])[:2])
        elif "UNPACK_B" in name and "MERGE_C" not in name and ".H1" not in sources[0]:
            result = (any(read(sources[0])[:2]),) * 4
        else:
            result = (any(any(read(x)) for x in sources),) * 4
        for register in range(int(target[1]), int(target[1]) + result_registers(name)):
            registers[register] = result
    return found


def stored_bytes(name: str, operand: str, registers: dict[int, tuple[bool, ...]]) -> tuple[bool, ...]:
    """Undefined bytes among those that a store writes."""
    match = REGISTER.match(operand)
    if match is None:
        return WORD
    n_bytes = next((n for suffix, n in ((".U8", 1), (".U16", 2), (".64", 8), (".128", 16)) if suffix in name), 4)
    first = int(match[1])
    words = [registers.get(first + i, UNDEFINED) for i in range((n_bytes + 3) // 4)]
    return sum(words, ())[:n_bytes]


def result_registers(name: str) -> int:
    """Registers that an instruction writes."""
    operation, *_ = name.split(".")
    if operation in ("HGMMA", "QGMMA"):
        return int(name.split("x")[1]) // 2
    if operation in ("HMMA", "QMMA", "IMMA") or ".128" in name or (operation == "LDSM" and name.endswith(".4")):
        return 4
    wide = ".64" in name or ".WIDE" in name or (operation == "LDSM" and name.endswith(".2"))
    return 2 if wide or (operation == "CS2R" and ".32" not in name) else 1


def permuted(low: tuple[bool, ...], selector: str, high: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of PRMT: each byte of the result is one of eight, or the sign of one."""
    if not selector.startswith("0x"):
        return (any(low + high),) * 4
    digits = int(selector, 16)
    return tuple((low + high)[(digits >> 4 * i) & 7] for i in range(4))


def masked(x: tuple[bool, ...], mask: str, other: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of a bitwise AND: what a mask of zeros covers is defined."""
    if not mask.startswith("0x"):
        return tuple(a or b for a, b in zip(x, other, strict=True))
    digits = int(mask, 16)
    return tuple(undefined and (digits >> 8 * i) & 0xFF != 0 for i, undefined in enumerate(x))
