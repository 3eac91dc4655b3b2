"""The examples run, as their first lines say."""

import ast
import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_geoscale

from .cli.conftest import text_file, tiny_folder  # noqa: F401
from .cli.test_inspect import gguf_and_folder  # noqa: F401

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


SMALL = ("--steps", 2, "--length", 32)
"""Of every example that takes steps: seconds on a CPU, as the docstrings say."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
class TestEveryExample:
    def test_is_one_page_that_says_how_to_start_it(self, path):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 100
        assert f"examples/{path.name}" in text.split('"""')[1]
        assert "--steps 2 --length 32" in text.split('"""')[1] or path.stem == "convert_gguf"

    def test_imports_public_names_only(self, path):
        ours = [
            (node.module, [alias.name for alias in node.names])
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_geoscale"
        ]
        assert all(module == "hf_geoscale" and set(names) <= set(hf_geoscale.__all__) for module, names in ours)
        assert "import hf_geoscale" not in path.read_text(encoding="utf-8")
        assert ours or path.stem == "convert_gguf"

    def test_has_help_with_defaults_of_length_and_steps(self, path, run, capsys):
        installed(
            *{"sft_trainer": ("trl", "datasets"), "dpo": ("trl", "datasets"), "qlora": ("peft",)}.get(path.stem, ())
        )
        with pytest.raises(SystemExit) as ended:
            run(path.name, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if path.stem != "convert_gguf":
            assert "[model]" in text
            assert "--steps" in text
            assert "--length" in text
            assert "8192" in path.read_text(encoding="utf-8") or "wiring" in text or path.stem == "transients"
        if path.stem not in ("convert_gguf", "transients"):
            assert "--report-to" in text
            assert "--text" in text or "--dataset" in text


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_says_first_how_many_gpus_it_needs(path):
    first, second, *rest = path.read_text(encoding="utf-8").splitlines()
    processes = next(line.split()[1] for line in rest if line.startswith("num_processes:"))
    assert first.startswith(f"# Needs {processes} NVIDIA GPUs")
    assert f"--config_file examples/accelerate/{path.name}" in second


@pytest.mark.parametrize("name", ["trainer.py", "accelerate_loop.py", "pretrain_gpt2.py"])
def test_a_text_that_is_too_short_is_said(run, tiny_folder, tmp_path, name):  # noqa: F811
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(SystemExit, match="fewer than --length 64"):
        run(name, tiny_folder, "--text", tmp_path / "short.txt", "--output", tmp_path, "--length", 64)


@pytest.mark.cpu  # tensorboard's events are read the same
def test_reporters_receive_the_losses(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    installed("tensorboard")
    run("trainer.py", tiny_folder, "--text", text_file, "--output", tmp_path, *SMALL, "--report-to", "tensorboard")
    assert list(tmp_path.rglob("events.out.*"))


def test_trainer(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    out = run("trainer.py", tiny_folder, "--text", text_file, "--output", tmp_path, *SMALL)
    assert "| utilisation | overflows |" in out
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
    out = run("accelerate_loop.py", tiny_folder, "--text", text_file, "--length", 256)
    assert bf16_launch().mixed_precision == "bf16"
    assert f"on {'cuda' if torch.cuda.is_available() else 'cpu'}" in out
    losses = [float(line.split()[-1]) for line in out.splitlines() if ": loss " in line]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])  # of batches drawn at random
    assert "| utilisation | overflows |" in out


@pytest.mark.feature("TRL SFTTrainer")
def test_sft_trainer(run, chat_folder, tmp_path):
    installed("trl", "datasets")
    out = run("sft_trainer.py", chat_folder, "--output", tmp_path / "out", *SMALL)
    assert "geoscale/overflows" in out
    assert "| utilisation | overflows |" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.feature("TRL DPOTrainer")
def test_dpo(run, chat_folder, tmp_path):
    installed("trl", "datasets")
    out = run("dpo.py", chat_folder, "--output", tmp_path / "out", *SMALL)
    assert "geoscale/overflows" in out
    assert "rewards/margins" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.feature("Pre-training from random weights")
def test_pretrain_gpt2(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    size = (*SMALL, "--width", 64, "--heads", 4, "--layers", 2)
    out = run("pretrain_gpt2.py", tiny_folder, "--output", tmp_path, "--text", text_file, *size)
    assert "geoscale/overflows" in out
    assert "| utilisation | overflows |" in out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.feature("QLoRA")
def test_qlora(run, tiny_folder, text_file, tmp_path):  # noqa: F811
    installed("peft", "bitsandbytes")
    out = run("qlora.py", tiny_folder, "--output", tmp_path, "--text", text_file, *SMALL)
    assert "geoscale/overflows" in out
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_transients(run, tiny_folder, text_file):  # noqa: F811
    out = run("transients.py", tiny_folder, "--text", text_file, *SMALL)
    overflows = {line.split(":")[0]: int(line.split(":")[1].split()[0]) for line in out.splitlines()[1:]}
    assert overflows["scales from the weights (geometry)"] == 0
    assert len(overflows) == 3


def test_convert_gguf(run, gguf_and_folder, tmp_path):  # noqa: F811
    path, folder = gguf_and_folder
    assert "parameters in float32" in run("convert_gguf.py", path, tmp_path / "converted")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "converted", folder))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    words = {"text": "Attention geometry", "add_special_tokens": False}
    ids = [AutoTokenizer.from_pretrained(f)(**words).input_ids for f in (tmp_path / "converted", folder)]
    assert ids[0] == ids[1]
