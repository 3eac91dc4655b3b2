"""No quantising kernel stores a byte that nothing computed, whatever ptxas assembles it (triton#11111)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_geoscale.kernels.backend import TRITON_INSTALLED

from .sass import disassembled, undefined_stores

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"89": "sm_89", "90": "sm_90a"}


def tools() -> Path:
    """Folder of the assemblers that Triton brings along."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[Path]:
    """PTX of every case of `compiled_stores`."""
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "tests.kernels.compiled_stores", folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(folder.glob("*.ptx"))


def wrong_stores(ptx: Path) -> Iterator[tuple[str, list[str]]]:
    """Assembler, and the stores of undefined bytes in what it makes of a file."""
    for ptxas in sorted(tools().glob("ptxas*")):
        cubin = ptx.with_suffix(f".{ptxas.name}.cubin")
        architecture = ARCHITECTURES[ptx.stem.split("-")[1]]
        subprocess.run([ptxas, f"--gpu-name={architecture}", ptx, "-o", cubin], check=True, capture_output=True)
        yield ptxas.name, undefined_stores(disassembled(cubin, tools() / "nvdisasm"))


def test_the_kernels_store_what_they_computed(compiled):
    kernels = [ptx for ptx in compiled if not ptx.name.startswith("cast-")]
    assert kernels
    found = {(ptx.name, ptxas): stores for ptx in kernels for ptxas, stores in wrong_stores(ptx) if stores}
    assert not found


def test_the_fault_is_seen_where_it_is(compiled):
    """Of the pattern with Triton's own cast, for which CUDA 12's ptxas, beside Triton 3.6 to 3.9, is known to be wrong."""
    casts = [ptx for ptx in compiled if ptx.name.startswith("cast-")]
    assert len(casts) == len(ARCHITECTURES)
    for ptx in casts:
        assert dict(wrong_stores(ptx))["ptxas"]
