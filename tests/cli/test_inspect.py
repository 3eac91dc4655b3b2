import json
import shutil

import pytest
import torch
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


@pytest.fixture
def gguf_and_folder(tiny_folder, tmp_path):
    """One model as llama.cpp writes it, projections in blocks of 8 bits, and as transformers does, with the same weights."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = load(str(tiny_folder))
    shape, q8 = model.config, gguf.GGMLQuantizationType.Q8_0
    folder, path = tmp_path / "folder", tmp_path / "file" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for name, weight in model.state_dict().items():
        values, kind = weight.numpy(), None
        if "_proj" in name:
            blocks, kind = gguf.quantize(values, q8), q8
            values = gguf.dequantize(blocks, q8)
            weight.copy_(torch.from_numpy(values))
        if (count := heads.get(name.split(".")[-2])) is not None:  # rows that RoPE turns together are neighbours there
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = values if kind is None else gguf.quantize(values, q8)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return path, folder


def test_gguf_file_and_folder(gguf_and_folder, tmp_path):
    path, folder = gguf_and_folder
    (mine, tokenizer), (theirs, other) = load(str(path.parent)), load(str(folder))
    assert tokenizer("Attention geometry").input_ids == other("Attention geometry").input_ids
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    result = run("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 2
    assert json.loads(run("inspect", folder, "--json").stdout)["rows"] == rows
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
