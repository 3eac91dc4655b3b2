"""Files of weights: what is wrong is told without reading the weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_geoscale.cli.weight_files import file_problem, weights_problem


@pytest.fixture
def folder(tmp_path):
    save_file({"x": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    return tmp_path


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"


def test_whole_weights_have_no_problem(folder):
    assert weights_problem(folder) is None


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_truncated_safetensors(folder, share):
    cut(folder / "model.safetensors", share)
    assert "model.safetensors is damaged or truncated" in weights_problem(folder)


def test_damaged_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert "model.safetensors is damaged" in weights_problem(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_pointers_and_empty_files(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    assert f"{name} is a Git LFS pointer" in file_problem(tmp_path / name)
    assert "git lfs pull" in file_problem(tmp_path / name)
    (tmp_path / name).write_text("")
    assert f"{name} is empty" in file_problem(tmp_path / name)
    assert "nothing is missing" in file_problem(tmp_path / "nothing")


def test_a_file_of_torch_save(tmp_path):
    torch.save({"x": torch.arange(1000.0)}, tmp_path / "pytorch_model.bin")
    assert weights_problem(tmp_path) is None
    cut(tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged or truncated" in weights_problem(tmp_path)


def test_shards_are_all_looked_at(tmp_path):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        save_file({name: torch.ones(100)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    assert weights_problem(tmp_path) is None
    cut(tmp_path / names[2])
    assert names[2] in weights_problem(tmp_path)
    (tmp_path / names[1]).unlink()
    assert f"{names[1]} is missing" in weights_problem(tmp_path)
    index.write_text('{"weight_map"')
    assert "model.safetensors.index.json is no index" in weights_problem(tmp_path)


def test_a_folder_without_weights(tmp_path):
    assert "holds no weights" in weights_problem(tmp_path)


def test_weights_that_transformers_would_not_load_do_not_count(folder):
    (folder / "consolidated.safetensors").write_text(POINTER)
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert weights_problem(folder) is None
