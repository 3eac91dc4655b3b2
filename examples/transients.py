"""Load a checkpoint into a patched model that has run other weights, and count overflows by the source of FP8 scales.

python examples/transients.py                                                  # SmolLM2 on the manual that ships with Python
python examples/transients.py MODEL --text corpus.txt --length 1024
python examples/transients.py MODEL --steps 2 --length 32                      # seconds on a CPU, to see that it runs
This shows one sudden change; `hf-geoscale transients MODEL --output FOLDER` plays seven, with a table and a figure.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_geoscale import geometry_report, patch_model, unpatch_model

SOURCES = {
    "the weights (geometry)": {"scaling": "geometry"},
    "a history of 1,024 calls (delayed)": {"scaling": "delayed"},
    "each call's operands (current)": {"scaling": "current"},
}


def overflows(model) -> int:
    """Entries beyond E4M3's range in all calls so far."""
    return sum(row["overflows"] for row in geometry_report(model).rows)


def main(model_name: str, text: str | None, steps: int, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    words = Path(text).read_text(encoding="utf-8") if text else "\n\n".join(topics.values())
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[:, :length]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device).eval()
    ids = ids.to(device)
    pretrained = {name: weight.clone() for name, weight in model.state_dict().items()}
    fresh = AutoModelForCausalLM.from_config(model.config).state_dict()
    print(f"{model_name}, {ids.shape[1]} tokens: {steps} forwards of fresh weights, then {steps} of the checkpoint's")
    for source, options in SOURCES.items():
        model.load_state_dict(fresh)
        patch_model(model, quantize_logits=True, **options)
        with torch.no_grad():
            for _ in range(steps):
                model(input_ids=ids, use_cache=False)
            before = overflows(model)
            model.load_state_dict(pretrained)
            losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for _ in range(steps)]
        print(
            f"scales from {source}: {overflows(model) - before} overflows after the change, first loss {losses[0]:.4f}"
        )
        unpatch_model(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_name", metavar="model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder"
    )
    parser.add_argument("--text", help="a text file; default: the manual that ships with Python")
    parser.add_argument("--steps", type=int, default=3, help="forwards before and after the change")
    parser.add_argument("--length", type=int, default=256, help="tokens of the text")
    main(**vars(parser.parse_args()))
