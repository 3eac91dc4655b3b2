"""A raw Accelerate loop: patch, train with gradient accumulation, refresh after each optimizer step, report.

accelerate launch --mixed_precision bf16 examples/accelerate_loop.py          # SmolLM2 on the manual that ships with Python
accelerate launch --mixed_precision bf16 examples/accelerate_loop.py MODEL --text corpus.txt --steps 500 --report-to wandb
python examples/accelerate_loop.py MODEL --steps 2 --length 32                # seconds on a CPU, to see that it runs
FP8 attention saves time on long sequences, hence the default length.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_geoscale import geometry_report, patch_model, refresh_scales

ACCUMULATE = 2


def token_blocks(tokenizer, text_file: str | None, length: int) -> torch.Tensor:
    """(sequences, length) token ids of a text, end to end."""
    text = Path(text_file).read_text(encoding="utf-8") if text_file else "\n\n".join(topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < length:
        raise SystemExit(f"the text gives {len(ids)} tokens, fewer than --length {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def main(model_name: str, text: str | None, output: str, steps: int, length: int, report_to: str) -> None:
    tracker = None if report_to == "none" else report_to
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, log_with=tracker, project_dir=output)
    accelerator.init_trackers("accelerate_loop")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = patch_model(AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    loader = DataLoader(token_blocks(tokenizer, text, length), batch_size=1, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.print(f"{model_name} on {accelerator.device}")
    step = 0
    while step < steps:
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
                accelerator.log({"loss": loss.item()}, step=step)
            if step == steps:
                break
    accelerator.end_training()
    accelerator.print(geometry_report(accelerator.unwrap_model(model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_name", metavar="model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder"
    )
    parser.add_argument("--text", help="a text file; default: the manual that ships with Python")
    parser.add_argument("--output", default="out/accelerate_loop", help="folder for the tracker's files")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
