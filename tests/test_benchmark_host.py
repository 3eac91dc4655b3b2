"""The commit that benchmarks record."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def host(monkeypatch):
    monkeypatch.delenv("GEOSCALE_COMMIT", raising=False)
    spec = importlib.util.spec_from_file_location("benchmark_host", ROOT / "benchmarks" / "host.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(host, tmp_path, monkeypatch):
    """A repository of one commit, and the short name of that."""
    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/records.jsonl"):
        (tmp_path / name).write_text("before\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "First")
    monkeypatch.setattr(host, "ROOT", tmp_path)
    return tmp_path, git(tmp_path, "rev-parse", "--short", "HEAD")


def test_the_commit_is_the_checkouts_wherever_it_is_asked_from(host, checkout, tmp_path_factory, monkeypatch):
    _, head = checkout
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert host.commit() == host.environment()["commit"] == head


def test_changes_of_tracked_code_are_said(host, checkout):
    folder, head = checkout
    (folder / "docs/records.jsonl").write_text("what a benchmark wrote\n")
    (folder / "untracked.py").write_text("")
    assert host.commit() == head
    (folder / "code.py").write_text("after\n")
    assert host.commit() == f"{head}+changes"
    git(folder, "add", "code.py")
    assert host.commit() == f"{head}+changes"


def test_the_variable_names_the_commit(host, checkout, monkeypatch):
    monkeypatch.setenv("GEOSCALE_COMMIT", "abc1234")
    assert host.commit() == "abc1234"


def test_no_checkout(host, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "ROOT", tmp_path)
    assert host.commit() == "unknown"
