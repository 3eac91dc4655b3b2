"""The report of ptxas reads registers and spills of kernels compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.register_operands import overwritten
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
    assert gradient["overwritten"] == transpose["overwritten"] == []
    for finding in (transpose, gradient):
        assert 0 < finding["registers"] <= 255
        assert {"spill_stores", "spill_loads", "stack", "warnings", "triton", "ptxas"} <= finding.keys()


CODE = """
        /*0010*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R88, R32, gdesc[UR12], R88 ;
        /*0020*/              @!P0 FMUL {first}, R4, R5 ;
        /*0030*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R88, R36, gdesc[UR16], R88, gsb0 ;
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, R40, gdesc[UR16], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, {allowed} ;
        /*0060*/                   LDS.128 R36, [R4] ;
        /*0070*/                   FMUL {last}, R4, R5 ;
"""


@pytest.mark.parametrize(
    ("first", "allowed", "last", "addresses"),
    [
        ("R36", "0x0", "R40", []),  # the second product is not under way at 0020
        ("R35", "0x0", "R40", ["0020"]),
        ("R36", "0x1", "R40", ["0070"]),  # the last group may still be under way
        ("R36", "0x1", "R32", []),
        ("R36", "0x2", "R32", ["0060", "0070"]),
    ],
)
def test_operands_lost_under_way(first, allowed, last, addresses):
    found = overwritten(CODE.format(first=first, allowed=allowed, last=last))
    assert [line.split(":")[0] for line in found] == addresses
