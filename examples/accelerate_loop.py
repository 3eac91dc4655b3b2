"""A raw Accelerate loop: patch, train with gradient accumulation, refresh after each optimizer step, report.

accelerate launch --mixed_precision bf16 examples/accelerate_loop.py MODEL                # the manual that ships with Python
accelerate launch --mixed_precision bf16 examples/accelerate_loop.py MODEL TEXT_FILE
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_geoscale import geometry_report, patch_model, refresh_scales
from hf_geoscale.cli.loading import read_text

LENGTH, STEPS, ACCUMULATE = 256, 20, 2


def main(model_name: str, text_file: str | None = None) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = patch_model(AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)).train()
    ids = tokenizer(read_text(text_file), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(blocks, batch_size=1, shuffle=True))
    accelerator.print(f"{model_name} on {accelerator.device}")
    step = 0
    while step < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                refresh_scales(model)  # optional here: the next forward would notice the new weights by itself
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step == STEPS:
                break
    accelerator.print(geometry_report(accelerator.unwrap_model(model)).to_markdown())


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
