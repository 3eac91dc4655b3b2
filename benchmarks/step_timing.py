"""Steps, their timing and the memory they need, for the whole-step benchmark."""

import gc
import math
import time
from dataclasses import dataclass, field

import torch
from step_models import SHAPES, Contender, build, contend
from torch import Tensor

from hf_geoscale import refresh_scales

LEARNING_RATE, CLIP = 1e-5, 1.0
WARMUP, BLOCK = 2, 3
"""Steps before timing, and timed steps in a row before another contender's turn: within them the CPU may run ahead of the GPU."""

BLOCKS_MIN, BLOCKS_MAX, CONFIGURATION_SECONDS = 2, 24, 12.0
"""Blocks of each contender: as many as this many seconds allow, at least BLOCKS_MIN."""

MEMORY_SHARE = 0.88
"""Of the GPU's memory, planned for; the rest is left to fragmentation and to the gate's copies (a guess)."""


class OutOfMemory(Exception):
    """A configuration or contender does not fit."""


class Timeline:
    """Marks on the device's own clock: CUDA events, or the wall clock of a CPU."""

    def __init__(self, device: str):
        self.cuda, self.marks = device == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Milliseconds between neighbouring marks; waits for the device."""
        synchronize(self.cuda)
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        return [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Fused AdamW whose states exist already, so that one contender's lack of memory cannot leave them half made."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    return optimizer


def train_step(contender: Contender, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """Forward, loss, backward, clipping, optimizer: everything but the refresh of our scales."""
    model = contender.model
    with contender.running():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class Times:
    """Of every timed step of a contender, in milliseconds."""

    step: list[float] = field(default_factory=list)  # device time, refresh included
    refresh: list[float] = field(default_factory=list)  # device time
    launch: list[float] = field(
        default_factory=list
    )  # CPU time of one step after a synchronisation, without the refresh
    refresh_host: list[float] = field(default_factory=list)  # CPU time, waiting for the device included
    peak_bytes: int = 0


def time_block(contender: Contender, optimizer: torch.optim.Optimizer, ids: Tensor, times: Times, steps: int) -> None:
    """Time some steps in a row, each with its refresh, and add them to `times`."""
    cuda = ids.device.type == "cuda"
    if contender.ours:
        refresh_scales(contender.model)  # other contenders moved the shared weights
    synchronize(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timeline = Timeline(ids.device.type)
    timeline.mark()
    for i in range(steps):
        started = time.perf_counter()
        train_step(contender, optimizer, ids)
        launched = time.perf_counter()
        timeline.mark()
        if contender.ours:
            refresh_scales(contender.model)
            times.refresh_host.append((time.perf_counter() - launched) * 1e3)
        timeline.mark()
        if i == 0:
            times.launch.append((launched - started) * 1e3)
    gaps = timeline.gaps()
    times.step += [a + b for a, b in zip(gaps[::2], gaps[1::2], strict=True)]
    times.refresh += gaps[1::2] if contender.ours else []
    if cuda:
        times.peak_bytes = max(times.peak_bytes, torch.cuda.max_memory_allocated())


def blocks_for(step_seconds: float) -> int:
    """How many blocks each contender gets, from the seconds of one step of each together."""
    return max(BLOCKS_MIN, min(BLOCKS_MAX, math.floor(CONFIGURATION_SECONDS / (BLOCK * step_seconds))))


def peak_of(model: str, layers: int, length: int, window: int | None, checkpointing: bool) -> int:
    """Peak bytes of two training steps with SDPA."""
    torch.cuda.reset_peak_memory_stats()
    base = build(model, layers, length, window, "cuda")
    contender = contend("SDPA", base, checkpointing)
    optimizer = make_optimizer(list(base.parameters()))
    ids = torch.zeros(1, length, dtype=torch.long, device="cuda")
    for _ in range(2):
        train_step(contender, optimizer, ids)
    return torch.cuda.max_memory_allocated()


def layers_that_fit(model: str, length: int, window: int | None, checkpointing: bool, limit: int | None) -> int:
    """Layers of a shape whose training step fits the GPU, from the peaks of one and of three layers; all of them on a CPU.

    Raises:
        OutOfMemory: not even three fit.
    """
    wanted = min(SHAPES[model].layers, limit or SHAPES[model].layers)
    if not torch.cuda.is_available() or wanted <= 3:
        return wanted
    try:
        peaks = []
        for layers in (1, 3):
            peaks.append(peak_of(model, layers, length, window, checkpointing))
            release()
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory(f"{layers} layers do not fit") from error
    memory = torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    layer = (peaks[1] - peaks[0]) / 2
    return min(wanted, 1 + math.floor((memory - peaks[0]) / layer))
