"""Preference tuning with TRL's DPOTrainer: policy and reference model both run FP8 attention.

accelerate launch examples/dpo.py                              # SmolLM2 on pairs made from the manual that ships with Python
accelerate launch examples/dpo.py MODEL --dataset trl-lib/ultrafeedback_binarized --output out --steps 500 --length 1024
python examples/dpo.py MODEL --steps 2 --length 32             # seconds on a CPU, to see that it runs
Needs trl and datasets. Answers are short: this shows the wiring, FP8 attention saves time from some thousand tokens on.
"""

import argparse
from pydoc_data.topics import topics

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_geoscale import GeoScaleCallback, geometry_report


def manual_pairs(length: int) -> Dataset:
    """Paragraphs of the manual: their true continuation is chosen, the one of the next paragraph rejected."""
    prompt, answer = length // 4, length // 2  # characters, so that both fit with any tokenizer
    parts = [part for text in topics.values() for part in text.split("\n\n") if len(part) > prompt + answer]
    return Dataset.from_dict(
        {
            "prompt": [part[:prompt] for part in parts],
            "chosen": [part[prompt : prompt + answer] for part in parts],
            "rejected": [part[prompt : prompt + answer] for part in parts[1:] + parts[:1]],
        }
    )


def main(model: str, dataset: str | None, output: str, steps: int, length: int, report_to: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(  # without ref_model, TRL loads a frozen copy of the model as the reference
            output_dir=output,
            max_steps=steps,
            max_length=length,
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=5e-6,
            logging_steps=1,
            report_to=report_to,
        ),
        train_dataset=manual_pairs(length) if dataset is None else load_dataset(dataset, split="train"),
        processing_class=tokenizer,
    )
    GeoScaleCallback().attach(trainer)  # patches both models; in `callbacks=` it would see the policy alone
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument(
        "--dataset", help="on the Hub, with columns chosen and rejected; default: made from Python's manual"
    )
    parser.add_argument("--output", default="out/dpo", help="folder for the model and the checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=256, help="most tokens of a prompt with its answer")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
