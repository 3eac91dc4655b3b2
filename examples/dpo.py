"""Preference tuning with TRL's DPOTrainer: policy and reference model both run FP8 attention.

accelerate launch examples/dpo.py MODEL OUTPUT_FOLDER               # pairs made from the manual that ships with Python
accelerate launch examples/dpo.py MODEL OUTPUT_FOLDER --dataset trl-lib/ultrafeedback_binarized --steps 500 --length 1024
Needs trl and datasets.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_geoscale import GeoScaleCallback, geometry_report
from hf_geoscale.cli.loading import read_text

PROMPT, ANSWER = 60, 120  # characters


def manual_pairs() -> Dataset:
    """Paragraphs of the manual: their true continuation is chosen, the one of the next paragraph rejected."""
    parts = [part for part in read_text(None).split("\n\n") if len(part) > PROMPT + ANSWER]
    return Dataset.from_dict(
        {
            "prompt": [part[:PROMPT] for part in parts],
            "chosen": [part[PROMPT : PROMPT + ANSWER] for part in parts],
            "rejected": [part[PROMPT : PROMPT + ANSWER] for part in parts[1:] + parts[:1]],
        }
    )


def main(model_name: str, output: str, dataset: str | None, steps: int, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32),
        args=DPOConfig(  # without ref_model, TRL loads a frozen copy of the model as the reference
            output_dir=output,
            max_steps=steps,
            max_length=length,
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=5e-6,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=manual_pairs() if dataset is None else load_dataset(dataset, split="train"),
        processing_class=tokenizer,
    )
    GeoScaleCallback().attach(trainer)  # patches both models; in `callbacks=` it would see the policy alone
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name", metavar="MODEL")
    parser.add_argument("output", metavar="OUTPUT_FOLDER")
    parser.add_argument("--dataset", help="on the Hub, with columns chosen and rejected")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="most tokens of a prompt with its answer")
    main(**vars(parser.parse_args()))
