"""Which model a name means, and what is said at once about one that is not there."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_geoscale.cli import sources
from hf_geoscale.cli.failures import InputError
from hf_geoscale.cli.sources import find_model

from .conftest import refused


def hub(monkeypatch, answer, cached=None):
    """A Hub that raises, or tells the files of a repository; nothing of it is cached, or one file."""

    def repo_info(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in answer])

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_: cached)


def http(kind):
    """An error of the Hub, without the response that each release of huggingface_hub wants of another library."""
    return kind.__new__(kind, "not there")


def message(name) -> str:
    with pytest.raises(InputError) as caught:
        find_model(str(name))
    return str(caught.value)


@pytest.mark.parametrize("name", ["./tinny", "../tinny", "/no/tinny", "~/tinny", "a/b/tinny", "tinny.gguf", "a//b"])
def test_what_can_be_no_hub_id_is_said_at_once(name, monkeypatch):
    hub(monkeypatch, AssertionError("asked the Hub"))
    said = message(name)
    assert f"there is no {'file' if name.endswith('.gguf') else 'folder'} {name}" in said


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_folder_one_stands_in(name):
    assert message(name) == "the model's name is empty: give a folder, a .gguf file or a Hub id"


@pytest.mark.parametrize("name", ["tinny", "models/tinny"])
def test_an_unreachable_hub_is_asked_once(name, monkeypatch):
    hub(monkeypatch, ConnectionError("Name or service not known"))
    started = time.monotonic()
    said = message(name)
    assert time.monotonic() - started < 2
    assert f"there is no folder {name}" in said
    assert "Name or service not known" in said


def test_a_similar_folder_is_offered(tmp_path, monkeypatch):
    (tmp_path / "tiny-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, ConnectionError("no network"))
    assert message("tiny-lama").endswith("Did you mean tiny-llama?")
    assert f"Did you mean {tmp_path}/tiny-llama?" in message(tmp_path / "tiny-lama")
    assert "Did you mean" not in message("something-else")


def test_a_model_that_the_hub_has_not(monkeypatch):
    hub(monkeypatch, http(RepositoryNotFoundError))
    said = message("org/tinny")
    assert "no folder org/tinny" in said
    assert "the Hub has no such model" in said


def test_what_the_hub_refuses_is_left_to_transformers(monkeypatch):
    hub(monkeypatch, http(HfHubHTTPError))
    assert find_model("org/gated").options == {}


def test_a_cached_model_does_without_the_hub(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hub(monkeypatch, ConnectionError("no network"), cached=str(tmp_path / "config.json"))
    source = find_model("org/model")
    assert source.options == {"local_files_only": True}
    assert source.folder == tmp_path


def test_kinds_of_repositories(monkeypatch, tmp_path):
    hub(monkeypatch, ["config.json", "model.safetensors"])
    assert find_model("org/model").location == "org/model"
    hub(monkeypatch, ["a.Q4.gguf", "README.md"])
    assert "hf download org/model a.Q4.gguf" in message("org/model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    hub(monkeypatch, ["adapter_config.json"], cached=str(tmp_path / "adapter_config.json"))
    fetched = []
    monkeypatch.setattr(sources, "hf_hub_download", lambda *args: fetched.append(args))
    assert find_model("org/adapter").adapter_base == "org/base"
    assert fetched == [("org/adapter", "adapter_config.json")]


def test_folders_and_files(tmp_path, tiny_folder):
    assert find_model(str(tiny_folder)).location == str(tiny_folder)
    assert find_model(str(tiny_folder)).adapter_base is None
    assert "0 .gguf files" in message(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)).gguf_file == "b.gguf"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "2 .gguf files: a.gguf, b.gguf; name one of them" in message(tmp_path)
    assert find_model(str(tmp_path / "a.gguf")).gguf_file == "a.gguf"
    assert "model.safetensors is a file" in message(tiny_folder / "model.safetensors")


def test_an_adapter_that_names_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json names no base model"):
        _ = find_model(str(tmp_path)).adapter_base


def test_commands_say_it_in_one_line(tmp_path, tiny_folder):
    for command in ("inspect", "finetune", "transients"):
        options = () if command == "inspect" else ("--output", tmp_path / "out")
        assert f"no folder {tmp_path}/nothing" in refused(command, tmp_path / "nothing", *options)
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    assert "Did you mean" in refused("inspect", tmp_path / "tinny")
    assert not (tmp_path / "out").exists()
