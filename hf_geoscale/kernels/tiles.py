"""Block shapes of the fused kernels, measured per GPU architecture: nothing is autotuned at a user's first step.

`tuning.tune_tiles` measures another GPU or head dimension and puts its finding into the table of the running process.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

SEQUENCE_PADDING = 128
"""Transposed operands are padded to this many positions; block sizes divide it."""


@dataclass(frozen=True)
class Tile:
    """One launch shape: query rows and keys per step, warps of a program, depth of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread: fewer let more programs share a multiprocessor

    @cached_property
    def launch(self) -> dict[str, int | None]:
        """The tile as keyword arguments of a kernel launch."""
        return {
            "BM": self.rows,
            "BN": self.keys,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


@dataclass(frozen=True)
class Tiles:
    """Launch shapes of the three attention kernels: output, gradient of the queries, gradients of keys and values."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


H100 = (9, 0)

# (compute capability, padded head dim, precision="high") → tiles, for causal and full attention alike: in causal launches all
# but the diagonal tiles are full. Right: TFLOP/s of O | dQ | dK and dV, counting 4, 6 and 8 · L² · D · heads / 2 operations (the
# products that two-term k adds are not counted). One H100 80 GB HBM3, 2026-11-22, torch 2.11, Triton 3.6, causal, one sequence,
# 32/8 heads, 16,384 tokens (8,192 for head dim 256 and precision="high"). `tuning.tune_tiles` measures again.
# The last column is from before dK and dV had one loop for masked and full tiles (equal to 13 % faster since).
TABLE: dict[tuple[tuple[int, int], int, bool], Tiles] = {
    (H100, 64, False): Tiles(Tile(64, 128, 4, 3, 128), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3, 168)),  # 634 | 820 | 676
    (H100, 128, False): Tiles(Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),  # 869 | 1015 | 908
    (H100, 256, False): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),  # 884 | 819 | 551
    (H100, 64, True): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),  # 432 | 446 | 530
    (H100, 128, True): Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # 587 | 584 | 631
}

DEFAULTS = {
    32: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
}
"""By padded head dimension, for GPUs without a row. A guess: small enough for 99 KiB of shared memory (compute capability 8.9)."""

INTERPRETED = Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up; `triton.cdiv` can also be called in kernels, and takes 2 µs for it."""
    return -(-x // y)


def padded_head_dim(dim: int) -> int:
    """Head dimension inside a kernel: the next power of two, at least the 32 that an FP8 product contracts over."""
    return max(32, 1 << (dim - 1).bit_length())


def tiles_for(device: torch.device, dim: int, high: bool) -> Tiles:
    """Launch shapes for a head dimension and precision on a device."""
    if device.type != "cuda":
        return INTERPRETED
    padded = padded_head_dim(dim)
    return TABLE.get((torch.cuda.get_device_capability(device), padded, high), DEFAULTS[padded])
