import json

import pytest
import torch

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.cli.loading import load

from .conftest import refused, run
from .test_weight_files import cut


def cells(output: str) -> list[list[str]]:
    """The table's rows."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")
    ]


def test_table_fits_80_columns_and_holds_the_reports_numbers(tiny_folder, text_file):
    rows = geometry_report(patch_model(load(str(tiny_folder))[0])).rows
    names = ("sigma_upper", "q_bound", "k_bound", "v_bound", "logit_bound")
    expected = [[str(row["layer"]), *(f"{max(row[name]):.4g}" for name in names)] for row in rows]
    plain = run("inspect", tiny_folder)
    assert plain.exit_code == 0, plain.output
    assert max(map(len, plain.stdout.splitlines())) <= 80
    assert "…" not in plain.stdout
    assert cells(plain.stdout) == expected
    seen = run("inspect", tiny_folder, "--text", text_file)
    assert max(map(len, seen.stdout.splitlines())) <= 80
    assert [row[:6] for row in cells(seen.stdout)] == expected
    assert all(0 < float(row[6]) < 1 and row[7] == "0" for row in cells(seen.stdout))


def test_verdict_backend_and_legend_are_said(tiny_folder, text_file):
    plain = " ".join(run("inspect", tiny_folder).stdout.split())
    assert "2 of 2 layers are certified: no q, k or v overflows E4M3" in plain
    assert "FP8 attention on this machine (" in plain
    assert "nats" in plain
    assert "overflows:" not in plain
    seen = " ".join(run("inspect", tiny_folder, "--text", text_file, "--max-tokens", 100).stdout.split())
    assert "In 100 tokens none did; layer " in seen
    assert "overflows: entries of the text" in seen


def test_overflows_are_in_the_verdict():
    from hf_geoscale.cli.inspect import verdict
    from hf_geoscale.integrations import GeometryReport

    rows = [{"layer": i, "q_bound": [1.0], "utilisation": u, "overflows": o} for i, u, o in ((0, 0.5, 0), (1, 1.5, 3))]
    said = verdict(GeometryReport(rows), 10)
    assert said.startswith("3 entries of 10 tokens overflowed; layer 1 came nearest")
    assert "hf-geoscale env" in said
    assert verdict(GeometryReport([*rows, rows[0] | {"q_bound": []}]), None).startswith("2 of 3 layers")


def test_wide_has_every_column(tiny_folder, text_file):
    result = run("inspect", tiny_folder, "--wide", "--text", text_file)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    header = next(line for line in result.stdout.splitlines() if "layer" in line)
    report = geometry_report(patch_model(load(str(tiny_folder))[0]))
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == list(report.COLUMNS)
    assert all(len(row) == len(report.COLUMNS) for row in cells(result.stdout))


def test_json_says_the_same_around_its_rows(tiny_folder):
    found = json.loads(run("inspect", tiny_folder, "--json").stdout)
    assert found["model"] == str(tiny_folder)
    assert found["verdict"].startswith("2 of 2 layers")
    assert "FP8 attention on this machine" in found["backend"]
    assert "nats" in found["legend"]["|logit| ≤"]


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
    rope = getattr(shape, "rope_parameters", None) or {"rope_theta": shape.rope_theta}  # 5.x, 4.57
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_bos_token_id(shape.bos_token_id)
    writer.add_eos_token_id(shape.eos_token_id)
    writer.add_add_bos_token(False)
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
    words = {"text": "Attention geometry", "add_special_tokens": False}  # which 4.57 does not read off a GGUF file
    assert tokenizer(**words).input_ids == other(**words).input_ids
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    result = run("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 2
    assert json.loads(run("inspect", folder, "--json").stdout)["rows"] == rows
    with pytest.raises(ValueError, match=r"0 \.gguf files"):
        load(str(tmp_path))


def test_gguf_that_was_cut_off(gguf_and_folder):
    path, _ = gguf_and_folder
    cut(path)
    assert f"{path} cannot be read: it is damaged, truncated" in refused("inspect", path)


def test_missing_text_is_named_before_the_model_loads():
    result = run("inspect", "no-such-model", "--text", "no/such/file")
    assert result.exit_code == 1
    assert "no/such/file" in result.output
