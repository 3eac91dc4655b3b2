"""Models that can, and cannot, be loaded: adapters, GGUF, damaged files, unsupported kinds."""

import json
import shutil
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_geoscale.cli.failures import InputError
from hf_geoscale.cli.loading import load, load_model, load_tokenizer

from .conftest import refused, run
from .test_weight_files import POINTER, cut

QUICK = ("--steps", 2, "--length", 16, "--eval-sequences", 1)
SMALL = {"vocab_size": 300, "hidden_size": 32}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


class TestDamage:
    @pytest.mark.parametrize("command", ["inspect", "finetune", "transients"])
    def test_truncated_weights_name_their_file(self, copy, tmp_path, command, text_file):
        cut(copy / "model.safetensors")
        options = () if command == "inspect" else ("--output", tmp_path / "out", "--text", text_file)
        assert f"{copy}/model.safetensors is damaged or truncated" in refused(command, copy, *options)

    def test_pointers(self, copy):
        (copy / "model.safetensors").write_text(POINTER)
        assert f"{copy}/model.safetensors is a Git LFS pointer" in refused("inspect", copy)
        (copy / "config.json").write_text(POINTER)
        assert f"{copy}/config.json is a Git LFS pointer" in refused("inspect", copy)

    def test_a_pointer_for_a_tokenizer(self, copy, text_file):
        (copy / "tokenizer.json").write_text(POINTER)
        assert f"{copy}/tokenizer.json is a Git LFS pointer" in refused("inspect", copy, "--text", text_file)
        assert run("inspect", copy).exit_code == 0  # without a text it is not read

    def test_a_configuration_that_is_no_json(self, copy):
        (copy / "config.json").write_text("{")
        assert "config.json" in refused("inspect", copy)

    def test_weights_of_another_shape(self, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
        assert f"transformers cannot load the model of {copy}" in refused("inspect", copy)

    def test_no_weights_at_all(self, copy):
        (copy / "model.safetensors").unlink()
        said = refused("inspect", copy)
        assert "model.safetensors" in said
        assert str(copy) in said

    def test_a_damaged_gguf_file(self, tmp_path):
        pytest.importorskip("gguf")
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 60)
        assert f"{path} cannot be read" in refused("inspect", path)
        path.write_text(POINTER)
        assert f"{path} is a Git LFS pointer" in refused("inspect", path)

    def test_gguf_that_is_not_installed(self, tmp_path, monkeypatch):
        (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
        monkeypatch.setitem(sys.modules, "gguf", None)
        said = refused("inspect", tmp_path / "tiny.gguf")
        assert "pip install gguf" in said


def test_inspect_wants_no_tokenizer_without_a_text(copy, tmp_path, text_file):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert run("inspect", copy).exit_code == 0
    for command in (("inspect", copy), ("finetune", copy, "--output", tmp_path / "out")):
        assert f"{copy} holds no tokenizer" in refused(*command, "--text", text_file)


@pytest.fixture
def kinds(tmp_path, tiny_folder):
    """Folders of models that are not supported, with the tiny model's tokenizer."""
    models = {
        "bert": BertLMHeadModel(
            BertConfig(**SMALL, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True)
        ),
        "bloom": BloomForCausalLM(BloomConfig(**SMALL, n_layer=1, n_head=2)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        for path in tiny_folder.glob("tokenizer*"):
            shutil.copy(path, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "no norm layer precedes q, k and v"), ("bloom", "ALiBi"), ("t5", "no causal language model")],
)
def test_unsupported_kinds_are_told_shortly(kinds, name, reason, text_file):
    finetune = ("finetune", kinds / name, "--output", kinds / "out", "--text", text_file)
    for command in (("inspect", kinds / name), finetune, ("transients", kinds / name, "--output", kinds / "out")):
        said = refused(*command)
        assert reason in said
        assert f" {name} model" in said
        assert "fallback" not in said
        assert "gpt_neox" not in said  # no list of the others
        assert len(said) < 300 + len(str(kinds))
    assert ("--scaling none" in refused(*finetune)) == (name != "t5")
    assert not (kinds / "out").exists()


def test_an_unsupported_kind_trains_without_fp8(kinds, text_file):
    command = ("finetune", kinds / "bloom", "--output", kinds / "out", "--text", text_file, "--scaling", "none")
    result = run(*command, *QUICK)
    assert result.exit_code == 0, result.output


def test_a_model_type_of_the_future(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama9", "architectures": ["Llama9"]}))
    said = refused("inspect", copy)
    assert "llama9" in said
    assert len(said) < 200 + len(str(copy))


def test_sequences_beyond_learned_positions(tmp_path, tiny_folder, text_file):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_head=2, n_layer=1, n_positions=24))
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    for path in tiny_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    for command in ("finetune", "transients"):
        said = refused(command, folder, "--output", tmp_path / "out", "--text", text_file, "--length", 32)
        assert "--length 32 is more than the 24 positions" in said
    assert run("inspect", folder, "--text", text_file).exit_code == 0  # takes as many tokens as fit


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """A LoRA of some effect on q and v, as PEFT saves it: without tokenizer and without its base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), options)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


class TestAdapter:
    def test_its_model_is_that_of_peft(self, adapter, tiny_folder):
        folder, theirs = adapter
        ours, tokenizer = load(str(folder))
        ids = tokenizer("Attention geometry", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = theirs(ids).logits
            assert not torch.allclose(load_model(str(tiny_folder)).eval()(ids).logits, expected, atol=1e-2)
            torch.testing.assert_close(ours.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert all(parameter.requires_grad for parameter in ours.parameters())

    def test_inspect_and_say_what_was_merged(self, adapter, tiny_folder, caplog):
        rows = json.loads(run("inspect", adapter[0], "--json").stdout)["rows"]
        assert rows[0]["q_bound"] != json.loads(run("inspect", tiny_folder, "--json").stdout)["rows"][0]["q_bound"]
        assert f"merged into its base, {tiny_folder}" in caplog.text

    def test_finetune_makes_an_ordinary_model(self, adapter, tmp_path, text_file):
        command = ("finetune", adapter[0], "--output", tmp_path / "out", "--text", text_file, *QUICK)
        result = run(*command, "--save-steps", 1)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "out" / "model" / "adapter_config.json").exists()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")

    def test_transients(self, adapter, tmp_path, text_file):
        options = ("--scenario", "fresh", "--strategy", "geometry", "--length", 16, "--text", text_file)
        result = run("transients", adapter[0], "--output", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output

    def test_its_own_tokenizer_comes_first(self, adapter, tiny_folder):
        folder, _ = adapter
        assert len(load_tokenizer(str(folder))) == 300
        AutoTokenizer.from_pretrained(tiny_folder, additional_special_tokens=["<new>"]).save_pretrained(folder)
        assert len(load_tokenizer(str(folder))) == 301

    def test_a_base_that_is_gone(self, adapter):
        folder, _ = adapter
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/base"}))
        said = refused("inspect", folder)
        assert f"{folder} is a PEFT adapter of /no/base" in said
        assert "no folder /no/base" in said

    def test_damaged_adapter(self, adapter):
        cut(adapter[0] / "adapter_model.safetensors")
        assert "adapter_model.safetensors is damaged or truncated" in refused("inspect", adapter[0])

    def test_without_peft(self, adapter, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        said = refused("inspect", adapter[0])
        assert "a PEFT adapter, needs peft" in said
        assert "pip install peft" in said

    def test_a_prompt_cannot_be_merged(self, tiny_folder, tmp_path):
        peft = pytest.importorskip("peft")
        options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), options)
        model.save_pretrained(tmp_path / "prompt")
        assert "PROMPT_TUNING, which cannot be merged" in refused("inspect", tmp_path / "prompt")


def test_load_raises_input_errors(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        load(str(tmp_path / "nothing"))
