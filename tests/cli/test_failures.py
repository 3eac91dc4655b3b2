"""Expected errors are one line, others keep their traceback and ask for a report."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_geoscale import NonFiniteWeightsError, UnsupportedModelError
from hf_geoscale.cli import environment
from hf_geoscale.cli.failures import InputError, RunError, condensed, failed_write, one_line, require

from .conftest import refused, run


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("kind", [InputError, RunError, UnsupportedModelError, NonFiniteWeightsError])
def test_an_expected_error_is_its_message(monkeypatch, kind):
    monkeypatch.setattr(environment, "environment", raising(kind("[bold]17[/bold] sheep, not 18")))
    assert refused("env") == "[bold]17[/bold] sheep, not 18"


@pytest.mark.parametrize("error", [ValueError("a bug of ours"), KeyError("missing"), TypeError("sequence item 0")])
def test_an_unexpected_error_keeps_its_traceback_and_asks_for_a_report(monkeypatch, error):
    monkeypatch.setattr(environment, "environment", raising(error))
    result = run("env")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert f"{type(error).__name__}: {error}" in result.stderr
    assert "hf-geoscale env" in " ".join(result.stderr.split())


def test_tracebacks_of_expected_errors_are_there_when_asked_for(monkeypatch):
    monkeypatch.setattr(environment, "environment", raising(InputError("17 sheep")))
    result = run("--traceback", "env")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: 17 sheep"


def test_ctrl_c_is_no_traceback(monkeypatch):
    monkeypatch.setattr(environment, "environment", raising(KeyboardInterrupt()))
    result = run("env")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


def test_an_operating_systems_error_names_its_file():
    assert (
        one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"))
        == "a/b: No such file or directory"
    )
    assert one_line(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert one_line(OSError("of some library, without a number")) is None


def test_out_of_memory_says_what_is_smaller():
    message = one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert "2.00 GiB" in message
    assert "--length" in message


def test_failed_writes_are_told_from_other_errors(tmp_path):
    """safetensors and torch raise no OSError: here are the real ones, of a folder that is missing and of a full disk."""
    with pytest.raises(SafetensorError) as caught:
        save_file({"x": torch.ones(2)}, tmp_path / "no" / "x.safetensors")
    assert "No such file" in failed_write(caught.value)
    with pytest.raises(RuntimeError) as caught, open("/dev/full", "wb") if has_full_device() else pytest.skip() as file:
        torch.save(torch.ones(100_000), file.name)
    assert failed_write(caught.value) is not None
    assert failed_write(RuntimeError("element 0 of tensors does not require grad")) is None
    assert failed_write(SafetensorError("Error while deserializing header: header too large")) is None


def has_full_device() -> bool:
    try:
        with open("/dev/full", "wb"):
            return True
    except OSError:
        return False


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(InputError, match=r"sheep needs no_such_package .*: pip install no_such_package"):
        require("no_such_package", "sheep")
    require("json", "nothing")


def test_condensed_is_one_short_line():
    assert condensed(ValueError("one\n  two.")) == "one two"
    assert len(condensed(ValueError("x" * 1000), 50)) == 50
    assert condensed(KeyError()) == "KeyError"


def test_typers_own_errors_stay_typers():
    result = run("finetune", "m", "--output", "x", "--steps", "0")
    assert result.exit_code == 2
    assert "Error:" not in result.stderr
    assert json.loads(run("env", "--json").stdout)
