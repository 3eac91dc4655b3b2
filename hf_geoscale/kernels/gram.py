"""Gram matrices of many small sets of rows in one launch, read where they lie."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import INTERPRETED, is_hopper, stream_of
from .launcher import DirectKernel

DIM_MAX = 128
"""Most rows of a Gram matrix: two float32 accumulators of 256 × 256 do not fit the registers."""

BLOCKS = 128, 64
"""Columns read at a time: the first that the shared memory has room for. BF16 heads of 128 and 64 rows on one H100: with 128
columns an eighth and a tenth less time than with 64, which beat 32 (script not kept)."""

TILES = 4
"""In shared memory on Hopper, and fewer elsewhere: two under way, and the scaled one as either operand of its product."""

CAPABILITY_WITH_BF16 = (8, 0)
"""First CUDA compute capability whose matrix units multiply BF16."""

IN_INTERPRETER = tl.constexpr(INTERPRETED)
"""Its casts to bfloat16 truncate, and its `dot` multiplies bfloat16 bit patterns as integers."""

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

Rows = tuple[Tensor, Tensor | None, int]  # (H, D, d), factors of the columns (d,), place of its first Gram matrix


@triton.jit
def _round_to_bfloat16(x, OPAQUE: tl.constexpr):
    """To nearest, ties to even.

    OPAQUE: in an instruction that the compiler knows nothing of, so that a scaled tile reaches both operands of its product through
    shared memory. Otherwise it is scaled twice, once as read in the order of an operand, eight threads to a bank. On Hopper only:
    Triton before 3.9 does not compile it for compute capability 10.0, and elsewhere it is not timed.
    """
    if IN_INTERPRETER:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif OPAQUE:
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    else:
        x = x.to(tl.bfloat16)
    return x


@DirectKernel
@triton.jit
def gram_kernel(
    p_table,  # (N, 3) int64: addresses of the rows and of the factors, place of the result
    p_gram,  # (…, D, D) float32
    width,  # d
    stride_d,
    stride_w,
    TYPE: tl.constexpr,  # of the rows
    FACTOR: tl.constexpr,  # type of the factors; None without
    ALIGNED: tl.constexpr,  # whether every address is a multiple of 16
    PART: tl.constexpr,  # most products summed in one float32, a multiple of BLOCK
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    OPAQUE: tl.constexpr,
):
    p_entry = p_table + 3 * tl.program_id(0)
    rows, factors, place = tl.load(p_entry), tl.load(p_entry + 1), tl.load(p_entry + 2)
    p_rows = rows.to(tl.pointer_type(TYPE))
    if ALIGNED:
        p_rows = tl.multiple_of(p_rows, 16)
    if FACTOR is not None:
        p_factors = factors.to(tl.pointer_type(FACTOR))
        if ALIGNED:
            p_factors = tl.multiple_of(p_factors, 16)
    o_row, o_column = tl.arange(0, DP), tl.arange(0, BLOCK)
    total = tl.zeros((DP, DP), tl.float32)
    for start in range(0, width, PART):
        part = tl.zeros((DP, DP), tl.float32)
        for first in range(start, min(start + PART, width), BLOCK):
            columns = first + o_column
            inside = (o_row < D)[:, None] & (columns < width)[None, :]
            # (DP, BLOCK)
            b_rows = tl.load(p_rows + o_row[:, None] * stride_d + columns[None, :] * stride_w, mask=inside, other=0.0)
            if FACTOR is not None:
                b_factors = tl.load(p_factors + columns, mask=columns < width, other=0.0).to(tl.float32)
                b_rows = b_rows.to(tl.float32) * b_factors[None, :]
            b_scaled = _round_to_bfloat16(b_rows.to(tl.float32), OPAQUE)
            part = tl.dot(b_scaled, tl.trans(b_scaled), part)
        total += part
    inside = (o_row < D)[:, None] & (o_row < D)[None, :]
    tl.store(p_gram + place * (D * D) + o_row[:, None] * D + o_row[None, :], total, mask=inside)


@lru_cache
def takes(dim: int, device: torch.device) -> bool:
    """Whether the kernels here and in `spectral` run for D × D matrices on a device."""
    if dim > DIM_MAX:
        return False
    if INTERPRETED:
        return device.type == "cpu"  # only there can it follow the addresses
    usable = device.type == "cuda" and torch.version.hip is None
    return usable and torch.cuda.get_device_capability(device) >= CAPABILITY_WITH_BF16


def can_read(weight: Tensor, factors: Tensor | None) -> bool:
    """Whether `grams` reads these (H, D, d) and (d,): of 16 or 32 bits, offsets in a head below 2³¹, the factors in one piece."""
    _, dim, width = weight.shape
    _, stride_d, stride_w = weight.stride()
    if weight.dtype not in _TYPES or dim * stride_d + width * stride_w >= 2**31:
        return False
    return factors is None or (factors.dtype in _TYPES and factors.is_contiguous() and factors.device == weight.device)


def block_of(dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns that `gram_kernel` reads at a time; 32-bit rows take the fewer, being untimed with more."""
    if INTERPRETED or dtype.itemsize > 2:
        return BLOCKS[-1]
    padded = shape_of(dim)["DP"]
    return next((b for b in BLOCKS if TILES * padded * b * dtype.itemsize < _shared_memory(device)), BLOCKS[-1])


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Most bytes that a program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@lru_cache
def shape_of(dim: int) -> dict[str, int]:
    """Compile-time arguments and warps of a program that holds D × D matrices in registers."""
    padded = max(16, 1 << (dim - 1).bit_length())
    return {"D": dim, "DP": padded, "num_warps": 8 if padded > 64 else 4}


class Tables(NamedTuple):
    """Where the rows and factors of some launches of `gram_kernel` lie."""

    device: torch.device
    stream: int  # whose launches follow the upload
    launches: list[tuple[Tensor, tuple[int, int, int], dict[str, Any]]]  # (N, 3) int64; width and strides; constants


def grams(
    rows: Sequence[Rows],  # as `can_read` allows, any strides, all with D of `out` and on its device
    out: Tensor,  # (N, D, D) float32
    part: int,
) -> None:
    """Write Â Âᵀ of every head, Â = bf16(rows · factors), the product rounded to float32 before. Makes no copy of the rows.

    Products are exact in float32; at most `part` of them are summed in one accumulator of the matrix units, and these sums are
    added one by one: d columns take ⌈d/part⌉ sums.
    """
    grams_of(tables(rows, out.device), out, part)


def grams_of(tables: Tables, out: Tensor, part: int) -> None:
    """`grams` of what lies at the addresses of `tables`."""
    shape = shape_of(out.shape[-1])
    with torch.cuda.device_of(out):
        for table, layout, constants in tables.launches:
            gram_kernel[(len(table),)](table, out, *layout, **constants, **shape, PART=part)


def tables(rows: Sequence[Rows], device: torch.device) -> Tables:
    """What `grams_of` needs to know of these; one launch for each width, layout and types."""
    kinds: dict[tuple, list[tuple[int, ...]]] = {}
    for weight, factors, place in rows:
        heads, dim, width = weight.shape
        stride_h, *strides = weight.stride()
        kind = (width, *strides, dim, weight.dtype, None if factors is None else factors.dtype)
        address = 0 if factors is None else factors.data_ptr()
        step = stride_h * weight.element_size()
        kinds.setdefault(kind, []).append((weight.data_ptr(), step, heads, address, place))
    stream, launches = stream_of(device), []
    for (*layout, dim, dtype, factor_type), entries in kinds.items():
        table, aligned = _table(tuple(entries), device, stream)
        constants = {"TYPE": _TYPES[dtype], "FACTOR": _TYPES.get(factor_type), "ALIGNED": aligned}
        constants |= {"BLOCK": block_of(dim, dtype, device), "OPAQUE": is_hopper(device)}
        launches.append((table, tuple(layout), constants))
    return Tables(device, stream, launches)


def is_current(tables: Tables) -> bool:
    """Whether launches from here on come after the tables' upload."""
    return tables.stream == stream_of(tables.device)


@lru_cache(maxsize=256)
def _table(entries: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> tuple[Tensor, bool]:
    """What `gram_kernel` reads, (N, 3) int64, and whether all its addresses are aligned. Kept: weights stay where they are.

    One for each stream, since nothing else orders the upload before a launch.
    """
    table = [
        (rows + head * step, factors, place + head)
        for rows, step, heads, factors, place in entries
        for head in range(heads)
    ]
    with torch.inference_mode(False):
        on_gpu = device.type == "cuda"  # from pinned memory nobody waits for the device
        uploaded = torch.tensor(table, dtype=torch.int64, device="cpu", pin_memory=on_gpu).to(device, non_blocking=True)
    return uploaded, all(address % 16 == 0 for *addresses, _ in table for address in addresses)
