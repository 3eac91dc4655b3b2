"""What a benchmark ran on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch


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


def environment(*packages: str) -> dict[str, str]:
    """GPU, driver, versions and commit; also of further packages."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "driver": _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "commit": _shell("git", "rev-parse", "--short", "HEAD"),
    }
