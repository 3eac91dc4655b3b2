"""The wheel, installed without extras and away from its source: `python wheel.py`, in an environment that has nothing else.

Prints a line for each thing that works, and the versions it worked with.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_geoscale

COMMAND = Path(sys.executable).parent / "hf-geoscale"
EXTRAS = ("peft", "trl", "datasets", "bitsandbytes", "torchao", "gguf", "matplotlib", "pytest")
SMALLEST_GAIN = 0.1  # of the loss on one batch, in four steps: well above FP8's error


def check(condition: bool, said: str) -> None:
    if not condition:
        sys.exit(f"wheel: {said} is not so")
    print(f"wheel: {said}")


def output(*command) -> str:
    done = subprocess.run(
        list(map(str, (COMMAND, *command))), capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(
            f"wheel: hf-geoscale {command[0]} ended with {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def train(model: LlamaForCausalLM) -> list[float]:
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(model: LlamaForCausalLM, folder: str) -> None:
    """With a tokenizer of single letters."""
    model.save_pretrained(folder)
    letters = {chr(32 + index): index for index in range(96)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main(folder: str) -> None:
    print(
        "resolved:",
        ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "numpy", "typer", "rich")
        ),
    )
    check(Path(hf_geoscale.__file__).is_relative_to(sys.prefix), "the package is the installed one")
    check(not [name for name in EXTRAS if find_spec(name)], "no extra is installed")
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **shape)).train()
    save(model, folder)
    ids = torch.randint(3, 96, (2, 32))
    exact = model(ids).logits.detach()
    hf_geoscale.patch_model(model)
    error = float((model(ids).logits.detach() - exact).norm() / exact.norm())
    check(0 < error < 0.0722, "patched logits are SDPA's within FP8's error")  # OUTPUT_ERROR of tests/tolerances.py
    losses = train(model)
    check(losses[-1] < losses[0] - SMALLEST_GAIN, "a patched model trains")
    rows = hf_geoscale.geometry_report(model).rows
    check(all(row["calls"] > 0 and row["overflows"] == 0 for row in rows), "its steps ran in FP8 without overflows")
    hf_geoscale.unpatch_model(model)
    check(model.config._attn_implementation == "sdpa", "it can be unpatched")
    check("inspect" in output("--help"), "hf-geoscale --help prints the commands")
    check("layer" in output("inspect", folder), "hf-geoscale inspect prints a table")
    check(len(json.loads(output("inspect", folder, "--json"))) == 2, "hf-geoscale inspect --json has a row a layer")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
