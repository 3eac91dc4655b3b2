"""QLoRA: a 4-bit base (bitsandbytes), LoRA adapters (peft), FP8 attention scaled by the effective weights.

accelerate launch examples/qlora.py                                            # SmolLM2 on the manual that ships with Python
accelerate launch examples/qlora.py MODEL --text corpus.txt --output out --steps 500 --report-to wandb
python examples/qlora.py MODEL --steps 2 --length 32                           # seconds on a CPU, to see that it runs
Needs peft and bitsandbytes. FP8 attention saves time on long sequences, hence the default length.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model


def token_blocks(tokenizer, text_file: str | None, length: int) -> torch.Tensor:
    """(sequences, length) token ids of a text, end to end."""
    text = Path(text_file).read_text(encoding="utf-8") if text_file else "\n\n".join(topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < length:
        raise SystemExit(f"the text gives {len(ids)} tokens, fewer than --length {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def main(model_name: str, text: str | None, output: str, steps: int, length: int, rank: int, report_to: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(
        model_name,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapters)
    patch_model(model.get_base_model())  # certificates of W + s·BA, layer by layer
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=steps,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=2e-4,
            logging_steps=1,
            report_to=report_to,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in token_blocks(tokenizer, text, length)],
        processing_class=tokenizer,
        data_collator=default_data_collator,  # every row has the same length
    )
    GeoScaleCallback().attach(trainer)  # keeps the scales fresh, logs what they saw
    trainer.train()
    trainer.save_model()  # the adapters alone
    if trainer.accelerator.is_main_process:
        print(geometry_report(model.get_base_model()).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_name", metavar="model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder"
    )
    parser.add_argument("--text", help="a text file; default: the manual that ships with Python")
    parser.add_argument("--output", default="out/qlora", help="folder for the adapters and the checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    main(**vars(parser.parse_args()))
