"""Pre-train a GPT-2 from random weights with FP8 attention; the defaults are GPT-2 small's.

accelerate launch examples/pretrain_gpt2.py                                    # on the manual that ships with Python
accelerate launch examples/pretrain_gpt2.py gpt2 --text corpus.txt --output out --steps 5000 --report-to wandb
python examples/pretrain_gpt2.py MODEL --steps 2 --length 32 --width 64 --heads 4 --layers 2    # seconds on a CPU
Of MODEL only the tokenizer is used. At GPT-2's own 1,024 tokens this shows the wiring: FP8 attention saves time on longer
sequences, as with --length 8192.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_geoscale import GeoScaleCallback, geometry_report


def token_blocks(tokenizer, text_file: str | None, length: int) -> torch.Tensor:
    """(sequences, length) token ids of a text, end to end."""
    text = Path(text_file).read_text(encoding="utf-8") if text_file else "\n\n".join(topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < length:
        raise SystemExit(f"the text gives {len(ids)} tokens, fewer than --length {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def main(
    model: str,
    text: str | None,
    output: str,
    steps: int,
    length: int,
    width: int,
    heads: int,
    layers: int,
    report_to: str,
) -> None:
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_embd=width,
        n_head=heads,
        n_layer=layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),  # dropout 0.1 in the attention too, as GPT-2 was trained
        args=TrainingArguments(
            output_dir=output,
            max_steps=steps,
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=4,
            learning_rate=6e-4,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=1,
            report_to=report_to,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in token_blocks(tokenizer, text, length)],
        processing_class=tokenizer,
        data_collator=default_data_collator,  # every row has the same length
    )
    GeoScaleCallback().attach(trainer)  # patches the model, keeps its scales fresh while the weights grow
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="openai-community/gpt2", help="Hub id or folder of a tokenizer")
    parser.add_argument("--text", help="a text file; default: the manual that ships with Python")
    parser.add_argument("--output", default="out/pretrain_gpt2", help="folder for the model and the checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=768, help="of the hidden states")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
