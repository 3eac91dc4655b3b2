"""`accelerate launch` with the shipped configurations, and accelerate's own FSDP2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..cli.conftest import text_file, tiny_folder  # noqa: F401
from . import stack_scenarios

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SHORT = ("--length", 256)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(configuration: str, *command) -> str:
    """Output of a launch, on two GPUs or else on the CPU, with gloo."""
    command = [*LAUNCH, "--config_file", EXAMPLES / "accelerate" / configuration, "--main_process_port", "0", *command]
    environment = os.environ | ({} if torch.cuda.device_count() > 1 else {"ACCELERATE_USE_CPU": "true"})
    command = [str(c) for c in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.feature("DDP")
def test_trainer_with_ddp(two, tmp_path):
    first, second = two.run(stack_scenarios.trainer, str(tmp_path))
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0]
    assert first["overflows"] == [0, 0, 0]
    assert first["calls"] == [12, 12]  # 3 steps of 2 micro-batches, each forward once more in the backward
    assert first["fresh"]
    assert second["fresh"]
    assert all(map(torch.equal, first["scales"], second["scales"]))


@pytest.mark.feature("DDP")
def test_raw_loop_with_ddp_launched(tiny_folder, text_file):  # noqa: F811
    """On the CPU too: there an Accelerator, unlike a Trainer, finds its process group without use_cpu."""
    out = launch("ddp.yaml", EXAMPLES / "accelerate_loop.py", tiny_folder, "--text", text_file, *SHORT)
    assert out.count("step 20: loss") == 1
    assert "| utilisation | overflows |" in out


@pytest.mark.gpu
@pytest.mark.feature("FSDP2")
@pytest.mark.parametrize("script", ["trainer.py", "accelerate_loop.py"])
def test_fsdp2_launched(tiny_folder, text_file, tmp_path, script):  # noqa: F811
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    out = launch("fsdp2.yaml", EXAMPLES / script, tiny_folder, "--text", text_file, *SHORT, "--output", tmp_path)
    assert re.search("geoscale/overflows|step 20: loss", out)


@pytest.mark.gpu
@pytest.mark.feature("DeepSpeed ZeRO-3")
@pytest.mark.parametrize("script", ["trainer.py", "accelerate_loop.py"])
def test_zero3_launched(tiny_folder, text_file, tmp_path, script):  # noqa: F811
    pytest.importorskip("deepspeed")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    out = launch("zero3.yaml", EXAMPLES / script, tiny_folder, "--text", text_file, *SHORT, "--output", tmp_path)
    assert re.search("geoscale/overflows|step 20: loss", out)


@pytest.mark.feature("FSDP2")
def test_accelerates_fsdp2(two):
    first, second = two.run(stack_scenarios.accelerate_fsdp2)
    assert first["sharded"]
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0] - 0.5
    assert first["measured"] == second["measured"] == [1, 1, 1]
    for a, b in zip(first["scales"], second["scales"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
