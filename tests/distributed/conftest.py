"""Two processes, and one to compare with: on the CPU with gloo, and on two GPUs with NCCL where there are."""

import pytest
import torch

from .processes import Processes


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


def _running(world: int, device: str):
    processes = Processes(world, device)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def one(device):
    yield from _running(1, device)


@pytest.fixture(scope="session")
def two(device):
    yield from _running(2, device)
