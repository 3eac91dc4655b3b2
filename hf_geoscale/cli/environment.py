"""`hf-geoscale env`: the contents of a bug report."""

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import __version__
from .failures import condensed

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "numpy"),
    *("peft", "trl", "datasets", "bitsandbytes", "torchao", "transformer_engine", "liger_kernel", "deepspeed", "gguf"),
    *("matplotlib", "typer", "rich"),
)
"""Distributions whose versions matter to a bug report. Versions are read off metadata; no package is imported."""

VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TORCH_COMPILE_DISABLE", "OMP_NUM_THREADS")
"""Environment variables that choose kernels, devices or files."""

QUERY_SECONDS = 10
"""How long nvidia-smi may take. A guess."""


def package_versions() -> dict[str, str | None]:
    """Versions of PACKAGES; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version, from nvidia-smi; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({condensed(error, 80)})"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _device(torch: Any, device: Any) -> dict[str, Any]:
    """One device and its kernels."""
    row: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        row["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        row["name"] = platform.processor() or platform.machine()
    from ..kernels.backend import choose_kernels

    row["kernels"], row["reason"] = choose_kernels("auto", device)
    return row


def _told(torch: Any, device: Any) -> dict[str, Any]:
    """`_device`, or why it cannot be told: drivers and Triton fail in many ways, and a bug report is about just that."""
    try:
        return _device(torch, device)
    except Exception as error:
        return {"device": str(device), "error": f"{type(error).__name__}: {condensed(error)}"}


def environment() -> dict[str, Any]:
    """Versions, devices and kernels. A torch that cannot be imported is part of the answer, not an error."""
    found: dict[str, Any] = {
        "hf_geoscale": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": package_versions(),
        "driver": driver_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    try:
        import torch
    except Exception as error:  # a broken install raises anything
        return found | {"torch_error": condensed(error), "devices": []}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return found | {"devices": [_told(torch, device) for device in devices]}


def print_environment(as_json: bool, console: Console) -> None:
    """The environment for a reader, or as JSON."""
    found = environment()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    installed = {name: number for name, number in found["packages"].items() if number is not None}
    missing = [name for name, number in found["packages"].items() if number is None]
    rows = [(name, found[name]) for name in ("hf_geoscale", "python", "system")]
    rows += list(installed.items())
    rows.append(("not installed", ", ".join(missing) or "–"))
    if "torch_error" in found:
        rows.append(("torch", f"cannot be imported: {found['torch_error']}"))
    else:
        rows.append(
            ("CUDA of torch", found["cuda"] or ("none (ROCm " + found["hip"] + ")" if found["hip"] else "none"))
        )
    rows.append(("NVIDIA driver", found["driver"] or "none"))
    rows += [(name, value) for name, value in found["variables"].items()]
    for device in found["devices"]:
        if "error" in device:
            rows.append((device["device"], device["error"]))
            continue
        extra = (
            f", compute capability {device['capability']}, {device['memory_gib']} GiB" if "capability" in device else ""
        )
        rows.append((device["device"], f"{device['name']}{extra}"))
        reason = "" if device["reason"] is None else f"; nothing faster, because: {device['reason']}"
        rows.append(("  FP8 attention", f"{device['kernels']}{reason}"))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
