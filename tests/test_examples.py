"""The examples run, as their first lines say."""

import subprocess
import sys
from pathlib import Path

from .cli.conftest import text_file, tiny_folder  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trainer(tiny_folder, text_file, tmp_path):  # noqa: F811
    out = run("trainer.py", tiny_folder, text_file, tmp_path)
    assert "geoscale/overflows" in out
    assert (tmp_path / "model.safetensors").exists()


def test_accelerate_loop(tiny_folder, text_file):  # noqa: F811
    out = run("accelerate_loop.py", tiny_folder, text_file)
    assert "step 20: loss" in out
    assert "| utilisation | overflows |" in out
