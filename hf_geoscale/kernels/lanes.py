"""Launches on two streams of a GPU, so that kernels of one run where those of the other leave the GPU idle."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch

from . import launcher

COUNT = 2
"""Lanes: the current stream, and one beside it."""


@lru_cache(maxsize=64)
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.current_stream(device), _beside(device)


def handles(device: torch.device, current: int) -> tuple[int, int]:
    """The driver's handles of both streams; `current` is that of the first."""
    return current, _beside(device).cuda_stream if device.type == "cuda" else current


def wait(device: torch.device, lane: int) -> None:
    """What is launched on a lane from now on comes after what the other one was given until now. Outside of `open_lanes`."""
    if device.type == "cuda":
        streams = _streams(device)
        streams[lane].wait_stream(streams[1 - lane])


@contextmanager
def open_lanes(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager]]:
    """What gives the context to launch in on a lane, 0 or 1. The second starts where the current stream stands, which waits for it
    at the end. Allocate before: memory of the current stream is free for it again only then.
    """
    _order(device, 1)
    try:
        yield lambda lane: _on(device, lane)
    finally:
        _order(device, 0)


def _order(device: torch.device, lane: int) -> None:
    wait(device, lane)
    launcher.note(launcher.Wait(device, lane))


@contextmanager
def _on(device: torch.device, lane: int) -> Iterator[None]:
    stream = torch.cuda.stream(_beside(device)) if lane and device.type == "cuda" else nullcontext()
    with stream, launcher.noting_lane(lane):
        yield
