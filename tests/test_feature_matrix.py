"""The recorder of the feature matrix, and the published matrix against its records and the tests that exist."""

from pathlib import Path
from types import SimpleNamespace

from .feature_matrix import Recorder, cell, marked_features, read, to_markdown

DOCS = Path(__file__).parent.parent / "docs"


def report(feature, outcome, when="call", refused=False, longrepr=None, elsewhere=None):
    properties = [("feature", (feature, refused))]
    if elsewhere:
        properties.append(("not on the device", elsewhere))
    return SimpleNamespace(user_properties=properties, outcome=outcome, when=when, longrepr=longrepr)


def test_a_run_replaces_what_its_machine_said_of_the_features_it_ran(tmp_path):
    path = tmp_path / "features.jsonl"
    first = Recorder(path)
    for one in (report("A", "passed"), report("A", "passed", "setup"), report("B", "failed"), report("C", "passed")):
        first.pytest_runtest_logreport(one)
    first.pytest_sessionfinish(None)
    second = Recorder(path)
    second.pytest_runtest_logreport(report("B", "passed"))
    second.pytest_runtest_logreport(report("D", "passed", refused=True))
    second.pytest_runtest_logreport(report("E", "skipped", "setup", longrepr=("f", 1, "Skipped: no GPU")))
    second.pytest_sessionfinish(None)
    (line,) = read(path)
    cells = {name: cell(counts) for name, counts in line["features"].items()}
    assert cells["A"] == cells["B"] == cells["C"] == "pass (1)"
    assert cells["D"] == "refused with a message (1)"
    assert cells["E"] == "not run: no GPU"
    assert "| A | pass (1) |" in to_markdown([line])


def test_what_ran_elsewhere_proves_nothing(tmp_path):
    recorder = Recorder(tmp_path / "features.jsonl")
    for one in (
        report("A", "passed", elsewhere="its test used no GPU"),
        report("B", "passed", elsewhere="its test used no GPU"),
        report("B", "passed"),
        report("C", "passed", refused=True, elsewhere="its test used no GPU"),
        report("D", "failed", elsewhere="its test used no GPU"),
    ):
        recorder.pytest_runtest_logreport(one)
    recorder.pytest_sessionfinish(None)
    (line,) = read(tmp_path / "features.jsonl")
    cells = {name: cell(counts) for name, counts in line["features"].items()}
    assert cells["A"] == cells["C"] == "not run: its test used no GPU"
    assert cells["B"] == "pass (1)"
    assert cells["D"] == "**fails** (1)"


def test_a_failure_outweighs_and_an_absent_feature_was_not_run():
    assert cell({"passed": 3, "failed": 1}) == "**fails** (1)"
    assert cell(None) == "not run"


def test_the_published_matrix_is_that_of_its_records_and_leaves_no_feature_out():
    lines = read(DOCS / "feature_matrix.jsonl")
    assert to_markdown(lines) == (DOCS / "feature_matrix.md").read_text(encoding="utf-8")
    recorded = {name for line in lines for name in line["features"]}
    assert marked_features(Path(__file__).parent) <= recorded
