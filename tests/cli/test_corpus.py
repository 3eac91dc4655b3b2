"""Text, data sets and their mistakes: each message names the file or row and says what to do."""

import json
import subprocess

import pytest

from hf_geoscale.cli import corpus
from hf_geoscale.cli.corpus import read_text
from hf_geoscale.cli.failures import InputError


def message(*arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_text(*arguments, **options)
    return str(caught.value)


def test_missing_file_and_folder(tmp_path):
    assert str(tmp_path / "no.txt") in message(str(tmp_path / "no.txt"))
    said = message(str(tmp_path))
    assert f"{tmp_path} is a folder" in said
    assert f"--dataset {tmp_path}" in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_name_the_file_and_a_remedy_that_works(tmp_path, encoding, monkeypatch):
    text = "café, and more of it"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding))
    said = message(str(path))
    assert f"{path} is not UTF-8" in said
    if encoding == "latin-1":
        assert "byte 0xe9 at position 3" in said
    if encoding != "utf-16-le":  # without a mark, iconv would guess the order of the bytes
        command = said[said.index("iconv") :]
        monkeypatch.chdir(tmp_path)
        subprocess.run(command, shell=True, check=True)
        assert read_text("utf8.txt") == text


def test_a_byte_order_mark_of_utf8_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(str(tmp_path / "text.txt")) == "one"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_text(tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    assert message(str(tmp_path / "empty.txt")) == f"{tmp_path / 'empty.txt'} holds no text"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("one")
    assert read_text("~/text.txt") == "one"


@pytest.fixture
def data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()

    def write(rows, split="train"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write


def test_a_data_set_of_text(data):
    assert read_text(None, data([{"text": "one"}, {"text": "two"}])) == "one\n\ntwo"
    assert read_text(None, data([{"text": "three"}], "test"), split="test") == "three"


def test_why_a_data_set_cannot_be_made(data):
    data([{"text": "one"}])
    assert "column names don't match" in message(None, data([{"words": "one"}], "test"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "one"}, {"text": None}], ("row 1", "'text'", "None", "leave such rows out")),
        ([{"text": 7}], ("row 0", "int", "--column")),
        ([{"text": ["one"]}], ("row 0", "list", "--column")),
        ([{"text": [{"role": "user", "content": "hi"}]}], ("row 0", "chat", "apply_chat_template")),
        ([{"words": "one"}], ("no column 'text'", "['words']", "--column")),
        ([{"text": ""}], ("holds no text",)),
    ],
)
def test_columns_and_rows_that_are_no_text(data, rows, expected):
    said = message(None, data(rows))
    for part in expected:
        assert part in said


def test_a_missing_split(data):
    said = message(None, data([{"text": "one"}], "test"))
    assert "no split 'train'" in said
    assert "['test']" in said
    assert "--split" in said


def test_data_sets_that_are_not_there(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(
        corpus, "ask_hub", lambda *args: asked.append(args) or (_ for _ in ()).throw(InputError("none"))
    )
    message(None, "no-such-data")
    assert asked == [("no-such-data", "dataset", False)]
    (tmp_path / "file.jsonl").write_text("{}")
    assert "is a file" in message(None, str(tmp_path / "file.jsonl"))


def test_a_folder_that_is_no_data_set(tmp_path):
    pytest.importorskip("datasets")
    assert str(tmp_path) in message(None, str(tmp_path))


def test_datasets_that_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "--dataset needs datasets" in message(None, "x")
