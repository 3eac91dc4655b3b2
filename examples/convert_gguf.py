"""Turn a GGUF file into an ordinary transformers folder, once, so that it loads in a second afterwards.

python examples/convert_gguf.py model.Q4_1.gguf folder
Needs gguf. The weights are dequantised to float32.
"""

import argparse
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(file: Path, folder: Path) -> None:
    options = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # transformers 5.x may keep the blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    model.hf_quantizer = None  # 5.x goes on calling dequantised weights quantised, and refuses to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters in float32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("folder", type=Path, help="where to write the model")
    main(**vars(parser.parse_args()))
