import json
import shutil
from pathlib import Path

import pytest
from transformers import BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from hf_geoscale.cli import app
from hf_geoscale.cli.loading import load


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_table(tiny_folder):
    result = run("inspect", tiny_folder)
    assert result.exit_code == 0
    assert "Attention geometry" in result.output


def test_json_has_every_head_and_what_the_text_reached(tiny_folder, text_file):
    plain = json.loads(run("inspect", tiny_folder, "--json").stdout)["rows"]
    assert len(plain) == 2
    assert len(plain[0]["sigma_upper"]) == 4
    assert plain[0]["utilisation"] is None
    seen = json.loads(run("inspect", tiny_folder, "--json", "--text", text_file, "--max-tokens", 100).stdout)["rows"]
    assert seen[0]["sigma_upper"] == plain[0]["sigma_upper"]
    for row in seen:
        assert 0 < row["utilisation"] < 1
        assert 0 < row["alpha_observed"] < 1
        assert row["overflows"] == 0
        for name in ("q", "k", "v", "logit"):
            assert all(a <= b for a, b in zip(row[f"{name}_amax"], row[f"{name}_bound"], strict=True))


def test_gguf_file_and_folder(tmp_path, request):
    path = request.config.getoption("--smollm2")
    if path is None:
        pytest.skip("needs SmolLM2-135M: run `make test`, or pass --smollm2 FOLDER")
    gguf = next(Path(path).parent.glob("*.gguf"))
    result = run("inspect", gguf, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 30
    assert json.loads(run("inspect", path, "--json").stdout)["rows"] == rows
    with pytest.raises(ValueError, match=r"0 \.gguf files"):
        load(str(tmp_path))


@pytest.mark.parametrize("arguments", [("--text", "no/such/file")])
def test_missing_text_is_named_before_the_model_loads(tiny_folder, arguments):
    result = run("inspect", "no-such-model", *arguments)
    assert result.exit_code == 1
    assert "no/such/file" in result.output


def test_missing_model(tmp_path):
    result = run("inspect", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "nothing" in result.output


def test_unsupported_family_is_named(tmp_path, tiny_folder):
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    shutil.copytree(tiny_folder, tmp_path / "bloom")
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    result = run("inspect", tmp_path / "bloom")
    assert result.exit_code == 1
    assert "UnsupportedModelError" in result.output
    assert "'bloom' is not supported" in result.output
