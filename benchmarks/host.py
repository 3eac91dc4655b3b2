"""What a benchmark ran on."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

COMMIT = "GEOSCALE_COMMIT"
"""Environment variable that names the commit, for a copy of the tree without its history."""
ROOT = Path(__file__).parent.parent


def _shell(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """$GEOSCALE_COMMIT as it stands, if set; else the checkout's commit, with "+changes" where tracked files differ from it.

    Files in docs/ do not count: they are what benchmarks write. "unknown" without git or outside a checkout.
    """
    if named := os.environ.get(COMMIT):
        return named
    head = _shell("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changes = _shell("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{head}+changes" if changes and head != "unknown" else head


def environment(*packages: str) -> dict[str, str]:
    """GPU, driver, versions and `commit`; also of further packages."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "driver": _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else "none",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "commit": commit(),
    }
