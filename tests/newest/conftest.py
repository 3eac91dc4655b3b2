"""What the smoke suite prints: the versions that pip resolved, and whether enough could be judged."""

from importlib.metadata import PackageNotFoundError, version

import pytest

SHOWN = (
    "torch", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes", "torchao", "liger-kernel", "triton", "gguf",
    "safetensors", "tokenizers", "huggingface-hub", "numpy", "matplotlib", "typer", "rich", "tensorboard",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    return "resolved: " + ", ".join(f"{package} {_version(package)}" for package in SHOWN)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """A run fails where most scenarios could not be judged: then it says nothing of this package."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    judged, upstream = (
        sum("test_control" not in report.nodeid for report in reporter.stats.get(outcome, ()))
        for outcome in ("passed", "xfailed")
    )
    if upstream > judged and session.exitstatus == 0:
        reporter.write_line(f"{upstream} scenarios fail without hf_geoscale and only {judged} pass: nothing is shown")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
