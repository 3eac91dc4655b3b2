"""Libraries that a model does not use are not imported for it."""

import subprocess
import sys

COMPANIONS = (
    "peft",
    "bitsandbytes",
    "trl",
    "deepspeed",
    "torchao",
    "liger_kernel",
    "datasets",
    "transformer_engine",
    "matplotlib",
)

# transformers imports some of them by itself: what is there before the package is the control.
SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model, ids = LlamaForCausalLM(config), torch.arange(16)[None]
def step(optimizer):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
optimizer = torch.optim.AdamW(model.parameters())
step(optimizer)
before = set(sys.modules)
from hf_geoscale import geometry_report, patch_model, refresh_scales, unpatch_model
patch_model(model, headroom=2.0)
step(optimizer)
refresh_scales(model)
step(optimizer)
model.eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
geometry_report(model).to_markdown()
unpatch_model(model)
print(" ".join(sorted({name.split(".")[0] for name in set(sys.modules) - before} & set(sys.argv[1:]))))
"""


def imported(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script, *COMPANIONS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_a_plain_model_imports_none():
    assert imported(SCRIPT) == []


def test_the_check_sees_one():
    """As if patching had imported PEFT."""
    assert imported(SCRIPT.replace("patch_model(model,", "sys.modules['peft'] = sys; patch_model(model,")) == ["peft"]
