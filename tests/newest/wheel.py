"""The wheel, installed without extras and away from its source: `python wheel.py`, in an environment that has nothing else.

Prints the versions, and a line for each thing that works; ends with the first that does not.
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
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_geoscale

COMMAND = Path(sys.executable).parent / "hf-geoscale"
EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
EXTRAS = ("peft", "trl", "datasets", "bitsandbytes", "torchao", "gguf", "matplotlib", "pytest")
OUTPUT_ERROR = 2 * 2**-4 / 3**0.5
"""Of tests/tolerances.py, which is not installed."""

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": lambda: transformers.LlamaConfig(**SHAPE),
    "Mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "Qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
    "GPT-2": lambda: transformers.GPT2Config(
        **{"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}
STEPS = 5
SMALLEST_GAIN = 0.05
"""Nats of a batch's loss in these steps. Without any training its loss stays, to the last bit."""


def check(condition: bool, said: str) -> None:
    if not condition:
        sys.exit(f"wheel: NOT SO: {said}")
    print(f"wheel: {said}", flush=True)


def output(*command) -> str:
    """What a process printed, errors included; ends this one unless that one ended well."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(f"wheel: {command[:2]} ended with {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check_family(name: str) -> None:
    """Forward, generation with a cache, backward and training, before and after patching."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
    ids = torch.randint(3, 96, (2, 32))

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        model.eval()
        with torch.no_grad():
            new = model.generate(
                ids,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return model(ids).logits, new.logits[0]

    exact = logits()
    hf_geoscale.patch_model(model)
    errors = [relative(ours, theirs) for ours, theirs in zip(logits(), exact, strict=True)]
    check(
        all(0 < error < OUTPUT_ERROR for error in errors), f"{name}: forward and generate are SDPA's within FP8's error"
    )
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=3e-3), []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check(losses[-1] < losses[0] - SMALLEST_GAIN, f"{name}: {STEPS} steps lower the loss")
    rows = hf_geoscale.geometry_report(model).rows
    check(all(row["calls"] > STEPS and not row["overflows"] for row in rows), f"{name}: in FP8, without overflows")
    fused = [row["front_end"] for row in rows]
    print(f"wheel: {name}: front end {' and '.join(sorted(set(fused)))}")
    hf_geoscale.unpatch_model(model)
    check(model.config._attn_implementation == "sdpa", f"{name}: unpatched")


def check_commands(folder: Path) -> None:
    model, text, out = folder / "model", folder / "text.txt", folder / "out"
    transformers.AutoModelForCausalLM.from_config(FAMILIES["Llama"]()).save_pretrained(model)
    letters = {chr(32 + index): index for index in range(96)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    text.write_text("The assert statement is a convenient way to insert debugging assertions into a program. " * 40)
    check("inspect" in output(COMMAND, "--help"), "hf-geoscale --help prints the commands")
    check(version("hf-geoscale") in output(COMMAND, "--version"), "hf-geoscale --version prints the version")
    check("torch" in output(COMMAND, "env"), "hf-geoscale env prints versions")
    check("layer" in output(COMMAND, "inspect", model), "hf-geoscale inspect prints a table")
    rows = subprocess.run([COMMAND, "inspect", model, "--json"], capture_output=True, text=True, check=True).stdout
    check(len(json.loads(rows)["rows"]) == 2, "hf-geoscale inspect --json has a row a layer")
    size = ("--steps", 2, "--length", 32)
    said = output(COMMAND, "finetune", model, "--text", text, "--output", out, *size, "--eval-sequences", 2)
    check("matplotlib" in said, "hf-geoscale finetune trains, and says that matplotlib is missing")
    said = output(sys.executable, EXAMPLE, model, "--text", text, "--output", folder / "loop", *size)
    check("overflows" in said, "examples/accelerate_loop.py trains")


def main(folder: Path) -> None:
    shown = ("hf-geoscale", "torch", "transformers", "accelerate", "numpy", "typer", "rich")
    print("resolved:", ", ".join(f"{name} {version(name)}" for name in shown), flush=True)
    check(Path(hf_geoscale.__file__).is_relative_to(sys.prefix), "the package is the installed one")
    check(not [name for name in EXTRAS if find_spec(name)], "no extra is installed")
    for name in FAMILIES:
        check_family(name)
    check_commands(folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
