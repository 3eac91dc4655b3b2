"""Every example and the command, each in a process of its own, as a user starts them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ..cli.conftest import text_file, tiny_folder  # noqa: F401
from ..cli.test_inspect import gguf_and_folder  # noqa: F401
from .control import run

ROOT = Path(__file__).parent.parent.parent
UNPATCHED = Path(__file__).parent / "unpatched.py"
COMMAND = Path(sys.executable).parent / "hf-geoscale"
LOAD = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
"""What of a command is upstream's, where it has no more."""

TIME_LIMIT = 120  # seconds


def output(*command) -> str:
    """What a process printed; raises with the end of it unless it ended well."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    environment.pop("TRITON_INTERPRET", None)  # of the test-suite
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    if done.returncode:
        raise RuntimeError(
            f"{Path(str(command[0])).name} … ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:  # noqa: F811
    """The tiny model with a padding and an end-of-text token, which TRL wants."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    AutoTokenizer.from_pretrained(tiny_folder, pad_token="!", eos_token="~").save_pretrained(folder)
    return folder


SMALL = ("--steps", 2, "--length", 32)
"""Of every example, as their first lines say."""

EXAMPLES = {
    "trainer": lambda model, text, out: (model, "--text", text, "--output", out, *SMALL),
    "accelerate_loop": lambda model, text, out: (model, "--text", text, "--output", out, *SMALL),
    "sft_trainer": lambda model, text, out: (model, "--output", out, *SMALL),
    "dpo": lambda model, text, out: (model, "--output", out, *SMALL),
    "pretrain_gpt2": lambda model, text, out: (
        *(model, "--text", text, "--output", out, *SMALL),
        *("--width", 64, "--heads", 4, "--layers", 2),
    ),
    "qlora": lambda model, text, out: (model, "--text", text, "--output", out, *SMALL),
    "transients": lambda model, text, out: (model, "--text", text, *SMALL),
}
"""Arguments of each example that trains or runs a model."""


def test_no_example_is_left_out():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys() | {"convert_gguf"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, model, text_file, tmp_path):  # noqa: F811
    def example(patched: bool) -> None:
        runner = () if patched else (UNPATCHED,)
        arguments = EXAMPLES[name](model, text_file, tmp_path / f"out {patched}")
        printed = output(sys.executable, *runner, ROOT / "examples" / f"{name}.py", *arguments)
        assert not patched or "overflows" in printed, printed

    run(example)


def test_convert_gguf(gguf_and_folder, tmp_path):  # noqa: F811
    path, _ = gguf_and_folder

    def convert(patched: bool) -> None:
        if patched:
            output(sys.executable, ROOT / "examples" / "convert_gguf.py", path, tmp_path / "converted")
            assert (tmp_path / "converted" / "model.safetensors").exists()
        else:
            load = LOAD.replace("sys.argv[1]", "sys.argv[1], gguf_file=sys.argv[2]")
            output(sys.executable, "-c", load, path.parent, path.name)

    run(convert)


COMMANDS = {
    "--help": lambda model, text, out: ("--help",),
    "env": lambda model, text, out: ("env",),
    "inspect": lambda model, text, out: ("inspect", model, "--text", text, "--max-tokens", 64),
    "inspect --json": lambda model, text, out: ("inspect", model, "--json"),
    "finetune": lambda model, text, out: (
        *("finetune", model, "--text", text, "--output", out, "--steps", 3, "--length", 64),
        *("--batch-size", 2, "--eval-sequences", 2),
    ),
    "transients": lambda model, text, out: (
        *("transients", model, "--text", text, "--output", out, "--steps", 9, "--length", 32),
        *("--seeds", 1),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, model, text_file, tmp_path):  # noqa: F811
    def command(patched: bool) -> None:
        arguments = COMMANDS[name](model, text_file, tmp_path / f"out {patched}")
        if patched:
            assert output(COMMAND, *arguments)
        elif name == "finetune":
            output(sys.executable, UNPATCHED, ROOT / "examples" / "trainer.py", model, text_file, tmp_path / "control")
        else:
            output(sys.executable, "-c", LOAD, model)

    run(command)
