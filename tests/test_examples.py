"""The examples run, as their first lines say."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from .cli.conftest import text_file, tiny_folder  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.places_itself


@pytest.fixture
def run(capsys, monkeypatch):
    """Run an example in this process, as `python examples/name arguments`; returns what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def start(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


@pytest.fixture
def chat_folder(tiny_folder, tmp_path):  # noqa: F811
    """The tiny model with a padding and an end-of-text token, which TRL wants."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    AutoTokenizer.from_pretrained(tiny_folder, pad_token="!", eos_token="~").save_pretrained(folder)
    return folder


def installed(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_one_page(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert path.name in text.split('"""')[1]  # how to start it


def test_trainer(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    out = run("trainer.py", tiny_folder, text_file, tmp_path)
    assert "geoscale/overflows" in out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.feature("Raw Accelerate loop")
def test_accelerate_loop(tiny_folder, text_file, request):  # noqa: F811
    """In a process of its own, by the launcher."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "bf16", "--dynamo_backend", "no", EXAMPLES / "accelerate_loop.py"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = list(map(str, [*launch, tiny_folder, text_file]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"on {device}" in done.stdout
    request.node.user_properties.append(("ran on", device))
    assert "step 20: loss" in done.stdout
    assert "| utilisation | overflows |" in done.stdout


@pytest.mark.feature("TRL SFTTrainer")
def test_sft_trainer(run, chat_folder, tmp_path):
    installed("trl", "datasets")
    out = run("sft_trainer.py", chat_folder, tmp_path / "out", "--steps", 2, "--length", 64)
    assert "geoscale/overflows" in out
    assert "| utilisation | overflows |" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.feature("TRL DPOTrainer")
def test_dpo(run, chat_folder, tmp_path):
    installed("trl", "datasets")
    out = run("dpo.py", chat_folder, tmp_path / "out", "--steps", 2)
    assert "geoscale/overflows" in out
    assert "rewards/margins" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.feature("Pre-training from random weights")
def test_pretrain_gpt2(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    size = ("--steps", 3, "--length", 64, "--width", 64, "--heads", 4, "--layers", 2)
    out = run("pretrain_gpt2.py", tiny_folder, tmp_path, "--text", text_file, *size)
    assert "geoscale/overflows" in out
    assert "| utilisation | overflows |" in out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.feature("QLoRA")
def test_qlora(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    installed("peft", "bitsandbytes")
    if importlib.util.find_spec("hf_geoscale.integrations.weights") is None:
        pytest.skip("certificates of adapters and 4-bit weights (hf_geoscale.integrations.weights) are not built yet")
    out = run("qlora.py", tiny_folder, tmp_path, "--text", text_file, "--steps", 2, "--length", 64)
    assert "geoscale/overflows" in out
    assert (tmp_path / "adapter_model.safetensors").exists()
