"""Published benchmark tables are what their scripts make of the recorded measurements."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not TRITON_INSTALLED, reason="the benchmark imports the fused kernels, which need Triton")
def test_the_speed_table_is_rendered_from_its_records():
    command = [sys.executable, "benchmarks/attention_speed.py", "--render", "docs/attention_speed.jsonl"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == (ROOT / "docs" / "attention_speed.md").read_text().strip()
