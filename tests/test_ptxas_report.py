"""The report of ptxas reads registers and spills of kernels compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

ROOT = Path(__file__).parent.parent
GIVEN = ("--case", "D 64 causal$", "--kernel", "transpose|query_gradient", "--json")


def test_each_kernel_has_a_finding():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "ptxas_report.py", *GIVEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "has no Gluon for Hopper" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    transpose, gradient = (json.loads(line) for line in done.stdout.splitlines())
    assert transpose["kernel"] == "transpose_kernel"
    assert transpose["products"] == 0
    assert gradient["kernel"] == "query_gradient_kernel"
    assert gradient["products"] > 0
    assert "CONSUMERS 3" in gradient["shape"]
    for finding in (transpose, gradient):
        assert 0 < finding["registers"] <= 255
        assert {"spill_stores", "spill_loads", "stack", "warnings", "triton", "ptxas"} <= finding.keys()
