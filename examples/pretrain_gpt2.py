"""Pre-train a GPT-2 from random weights with FP8 attention; the defaults are GPT-2 small's.

accelerate launch examples/pretrain_gpt2.py TOKENIZER OUTPUT_FOLDER              # on the manual that ships with Python
accelerate launch examples/pretrain_gpt2.py gpt2 OUTPUT_FOLDER --text corpus.txt --steps 5000
TOKENIZER is a model on the Hub or a folder; only its tokenizer is used.
"""

import argparse

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
from hf_geoscale.cli.loading import read_text


def main(
    tokenizer_name: str, output: str, text: str | None, steps: int, length: int, width: int, heads: int, layers: int
) -> None:
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_embd=width,
        n_head=heads,
        n_layer=layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = tokenizer(read_text(text), return_tensors="pt", verbose=False).input_ids[0]
    blocks = ids[: len(ids) // length * length].view(-1, length)
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
            report_to="none",
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
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
    parser.add_argument("tokenizer_name", metavar="TOKENIZER")
    parser.add_argument("output", metavar="OUTPUT_FOLDER")
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    main(**vars(parser.parse_args()))
