"""`hf-geoscale env`, --version and --help."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import hf_geoscale
from hf_geoscale.cli import environment
from hf_geoscale.kernels import backend

from .conftest import run


def test_json_has_what_a_report_needs():
    found = json.loads(run("env", "--json").stdout)
    assert found["hf_geoscale"] == hf_geoscale.__version__
    assert found["python"] == platform.python_version()
    assert found["cuda"] == torch.version.cuda
    for name in ("torch", "transformers", "accelerate"):
        assert found["packages"][name] == version(name)
    assert set(environment.PACKAGES) == set(found["packages"])
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()


def test_text_fits_80_columns_and_says_why():
    lines = run("env").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert f"torch {version('torch')}" in text
    assert "plain PyTorch" in text
    assert "TRITON_INTERPRET" in text or "NVIDIA" in text or "Triton 3.4" in text


def test_packages_are_not_imported():
    code = (
        "import sys; from hf_geoscale.cli.environment import package_versions; package_versions();"
        "print([m for m in ('torch', 'peft', 'trl', 'bitsandbytes', 'torchao', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_package_that_is_missing_is_none(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.package_versions() == {"torch": version("torch"), "no-such-package": None}
    assert "not installed" in run("env").stdout
    assert "no-such-package" in run("env").stdout


def test_a_torch_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = environment.environment()
    assert "torch" in found["torch_error"]
    assert found["packages"]["transformers"] == version("transformers")
    assert "cannot be imported" in run("env").stdout


def test_a_device_that_fails_is_told(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(backend, "choose_kernels", fail)
    expected = "RuntimeError: CUDA driver version is insufficient"
    assert environment.environment()["devices"][0] == {"device": "cpu", "error": expected}
    assert expected in " ".join(run("env").stdout.split())


def test_the_driver_is_asked_of_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.12.34\necho 570.12.34\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.driver_version() == "570.12.34"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert environment.driver_version().startswith("unknown")
    monkeypatch.setenv("PATH", "")
    assert environment.driver_version() is None


def test_kernels_are_those_of_the_backend():
    for device in environment.environment()["devices"]:
        name, reason = backend.choose_kernels("auto", torch.device(device["device"]))
        assert (device["kernels"], device["reason"]) == (name, reason)


def test_version():
    assert run("--version").stdout.strip() == f"hf-geoscale {hf_geoscale.__version__}"


@pytest.mark.parametrize("command", [(), ("env",), ("inspect",), ("finetune",), ("transients",)])
def test_help_is_short_for_h_and_fits_80_columns(command):
    short, long = run(*command, "-h"), run(*command, "--help")
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    lines = short.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in short.stdout
    assert len(lines) < 90


def test_options_of_finetune_are_grouped():
    text = run("finetune", "-h").stdout
    for panel in ("Data", "FP8 attention", "Training", "Output and resuming"):
        assert f"─ {panel} ─" in text
