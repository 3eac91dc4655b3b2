"""Block shapes of the fused kernels, measured per GPU architecture: nothing is autotuned at a user's first step.

`tune.tune_kernels` measures other GPUs and head dimensions and puts its finding into the table of the running process.
"""

from dataclasses import dataclass, replace

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

    @property
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


# (compute capability, padded head dim, causal) → tiles; None stands for both. One H100 80 GB HBM3, 2026-11-22, torch 2.11, Triton 3.6,
# B1 L16384, 32/8 heads: TFLOP/s of forward | dQ | dK and dV (4, 6 and 8 · L² · D · heads / 2 operations).
TABLE: dict[tuple[tuple[int, int], int, bool | None], Tiles] = {
    ((9, 0), 64, None): Tiles(Tile(64, 128, 4, 3, 128), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3, 168)),
    ((9, 0), 128, None): Tiles(Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
}

DEFAULTS = {
    32: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1)),
}
"""For GPUs without a row: small enough for 99 KiB of shared memory (sm_89)."""

INTERPRETED = Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))


def padded_head_dim(dim: int) -> int:
    """Head dimension inside a kernel: the next power of two, at least the 32 that an FP8 product contracts over."""
    return max(32, 1 << (dim - 1).bit_length())


def _without_pipelining(tile: Tile) -> Tile:
    return replace(tile, stages=1)


def tiles_for(device: torch.device, dim: int, causal: bool, high: bool) -> Tiles:
    """Launch shapes for a head dimension on a device; precision="high" holds more operands, so it pipelines less."""
    if device.type != "cuda":
        return INTERPRETED
    capability, padded = torch.cuda.get_device_capability(device), padded_head_dim(dim)
    tiles = TABLE.get((capability, padded, causal)) or TABLE.get((capability, padded, None)) or DEFAULTS[padded]
    if high and padded >= 128:
        return HIGH_PRECISION.get((capability, padded), DEFAULTS[padded])
    return tiles


HIGH_PRECISION: dict[tuple[tuple[int, int], int], Tiles] = {}
