"""Fine-tune any supported model with the Trainer and one callback.

python examples/trainer.py MODEL TEXT_FILE OUTPUT_FOLDER
accelerate launch examples/trainer.py MODEL TEXT_FILE OUTPUT_FOLDER
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_geoscale import GeoScaleCallback

LENGTH = 256  # tokens of a sequence


def main(model_name: str, text_file: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    with open(text_file, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=20,
            logging_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
            report_to="none",
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        callbacks=[GeoScaleCallback(every_n_steps=1)],  # patches the model, and keeps its scales fresh
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
