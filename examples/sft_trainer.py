"""Supervised fine-tuning with TRL, FP8 attention, and packed documents.

accelerate launch examples/sft_trainer.py                                      # SmolLM2 on the manual that ships with Python
accelerate launch examples/sft_trainer.py MODEL --dataset trl-lib/Capybara --output out --steps 500 --report-to wandb
python examples/sft_trainer.py MODEL --steps 2 --length 32                     # seconds on a CPU, to see that it runs
Needs trl and datasets. FP8 attention saves time on long rows, hence the default length.
"""

import argparse
from pydoc_data.topics import topics

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_geoscale import GeoScaleCallback, geometry_report


def main(model: str, dataset: str | None, output: str, steps: int, length: int, report_to: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    manual = Dataset.from_dict({"text": list(topics.values())})
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),  # bf16=True computes in bfloat16
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
            report_to=report_to,
        ),
        train_dataset=manual if dataset is None else load_dataset(dataset, split="train"),
        processing_class=tokenizer,
    )
    GeoScaleCallback().attach(trainer)  # patches the model, keeps its scales fresh, logs what they saw
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(geometry_report(trainer.accelerator.unwrap_model(trainer.model)).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--dataset", help="on the Hub, in a format that SFTTrainer reads; default: Python's manual")
    parser.add_argument("--output", default="out/sft_trainer", help="folder for the model and the checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
