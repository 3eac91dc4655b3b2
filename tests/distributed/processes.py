"""Worker processes with a process group, which run functions of `scenarios` and return what every rank returned."""

import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START_SECONDS, RUN_SECONDS = 180, 240
"""Limits for importing transformers on a busy machine, and for one scenario."""

PRELOADED = ["transformers.trainer", "hf_geoscale.integrations"]
"""Modules that take seconds to import: once for all processes on the CPU."""


LACKING = {
    "'Stream' object has no attribute 'record_event'": "FSDP2 of this torch (before 2.7) does not run on CPUs",
    "unexpected keyword argument 'fsdp_version'": "accelerate before 1.6 has no plugin for FSDP2",
}
"""Errors of a release that lacks what a scenario is about, and what it lacks."""


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _serve(rank: int, world: int, port: int, device: str, pipe) -> None:
    """Run what comes through the pipe, until None comes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=RUN_SECONDS))
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        function, arguments, options = job
        environment = dict(os.environ)  # accelerate's plugins write there
        try:
            pipe.send((function(device, *arguments, **options), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
        os.environ.clear()
        os.environ.update(environment)
    dist.destroy_process_group()


class Processes:
    """`world` processes on the CPU with gloo, or on as many GPUs with NCCL."""

    def __init__(self, world: int, device: str):
        context = mp.get_context("spawn" if device == "cuda" else "forkserver")  # CUDA does not survive a fork
        context.set_forkserver_preload(PRELOADED)
        port = _free_port()
        self.device = device
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, device, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self._receive(START_SECONDS)

    def _receive(self, seconds: float) -> list:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                self.stop()
                raise TimeoutError(f"process {rank} did not answer within {seconds} s")
            answers.append(pipe.recv())
        return answers

    def run(self, function, *arguments, **options) -> list:
        """What `function(device, *arguments, **options)` returns, by rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        answers = self._receive(RUN_SECONDS)
        for rank, (_, error) in enumerate(answers):
            lacking = [reason for sign, reason in LACKING.items() if error is not None and sign in error]
            if lacking:
                pytest.skip(lacking[0])
            if error is not None:
                raise RuntimeError(f"process {rank}:\n{error}")
        return [result for result, _ in answers]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
