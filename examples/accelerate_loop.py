"""A raw Accelerate loop: patch, train, refresh after each optimizer step, report.

accelerate launch examples/accelerate_loop.py MODEL TEXT_FILE
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_geoscale import geometry_report, patch_model, refresh_scales

LENGTH, STEPS = 256, 20


def main(model_name: str, text_file: str) -> None:
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = patch_model(AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"))
    with open(text_file, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(blocks, batch_size=1, shuffle=True))
    for step, batch in zip(range(STEPS), loader, strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        refresh_scales(model)  # optional here: the next forward would notice the new weights by itself
        accelerator.print(f"step {step + 1}: loss {loss.item():.4f}")
    accelerator.print(geometry_report(accelerator.unwrap_model(model)).to_markdown())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
