"""Fine-tune any supported model with the Trainer and one callback.

python examples/trainer.py                                                     # SmolLM2 on the manual that ships with Python
accelerate launch examples/trainer.py MODEL --text corpus.txt --output out --steps 500 --report-to tensorboard
python examples/trainer.py MODEL --steps 2 --length 32                         # seconds on a CPU, to see that it runs
FP8 attention saves time on long sequences, hence the default length.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_geoscale import GeoScaleCallback, geometry_report


def token_blocks(tokenizer, text_file: str | None, length: int) -> torch.Tensor:
    """(sequences, length) token ids of a text, end to end."""
    text = Path(text_file).read_text(encoding="utf-8") if text_file else "\n\n".join(topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < length:
        raise SystemExit(f"the text gives {len(ids)} tokens, fewer than --length {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def main(model: str, text: str | None, output: str, steps: int, length: int, report_to: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),  # bf16=True computes in bfloat16
        args=TrainingArguments(
            output_dir=output,
            max_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
            report_to=report_to,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in token_blocks(tokenizer, text, length)],
        processing_class=tokenizer,
        data_collator=default_data_collator,  # every row has the same length
        callbacks=[GeoScaleCallback(every_n_steps=1)],  # patches the model, and keeps its scales fresh
    )
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--text", help="a text file; default: the manual that ships with Python")
    parser.add_argument("--output", default="out/trainer", help="folder for the model and the checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
