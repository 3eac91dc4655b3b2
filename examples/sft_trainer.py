"""Supervised fine-tuning with TRL, FP8 attention, and packed documents.

accelerate launch examples/sft_trainer.py MODEL OUTPUT_FOLDER                     # trains on the manual that ships with Python
accelerate launch examples/sft_trainer.py MODEL OUTPUT_FOLDER --dataset trl-lib/Capybara --steps 500 --length 2048
Needs trl and datasets.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_geoscale import GeoScaleCallback, geometry_report
from hf_geoscale.cli.loading import read_text


def main(model_name: str, output: str, dataset: str | None, steps: int, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)  # bf16=True computes in bfloat16
    if dataset is None:
        data = Dataset.from_dict({"text": [part for part in read_text(None).split("\n\n") if part.strip()]})
    else:
        data = load_dataset(dataset, split="train")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output,
            max_steps=steps,
            max_length=length,
            packing=True,  # no token sees another document
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=5e-5,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    GeoScaleCallback().attach(trainer)  # patches the model, keeps its scales fresh, logs what they saw
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name", metavar="MODEL")
    parser.add_argument("output", metavar="OUTPUT_FOLDER")
    parser.add_argument("--dataset", help="on the Hub, in a format that SFTTrainer reads")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row")
    main(**vars(parser.parse_args()))
