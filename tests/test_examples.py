"""The examples run, as their first lines say."""

import importlib.util
import runpy
import shutil
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


@pytest.fixture
def bf16_launch(monkeypatch):
    """What `accelerate launch --mixed_precision bf16` leaves to its process; distributed/test_accelerate.py runs the launcher."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    reset()
    yield AcceleratorState
    reset()


@pytest.mark.feature("Raw Accelerate loop")
def test_accelerate_loop(run, tiny_folder, text_file, bf16_launch):  # noqa: F811
    out = run("accelerate_loop.py", tiny_folder, text_file)
    assert bf16_launch().mixed_precision == "bf16"
    assert f"on {'cuda' if torch.cuda.is_available() else 'cpu'}" in out
    losses = [float(line.split()[-1]) for line in out.splitlines() if ": loss " in line]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])  # of batches drawn at random
    assert "| utilisation | overflows |" in out


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
