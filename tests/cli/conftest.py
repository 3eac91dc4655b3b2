import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_geoscale.cli import app
from hf_geoscale.cli.loading import read_text

from ..conftest import SHAPE


def run(*arguments):
    """The command in this process; its output as in a pipe, 80 characters wide."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(a) for a in arguments])


def refused(*arguments) -> str:
    """The one line that a command which must fail says, last; no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    said = [line for line in result.output.splitlines() if line.strip()]
    assert said[-1].startswith("Error: "), result.output
    assert sum(line.startswith("Error: ") for line in said) == 1
    return said[-1].removeprefix("Error: ")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(read_text(None)[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, text_file):
    """A saved Llama of two layers with a byte-level tokenizer of 300 tokens."""
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(text_file)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 300})).save_pretrained(folder)
    return folder
