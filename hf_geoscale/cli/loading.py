"""Models and text, from the hub, a folder or a file."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def _gguf_file(model: str) -> tuple[str, str] | None:
    """(folder, file name) when `model` is a GGUF file, or a folder that holds just one and no config.json."""
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), files[0].name
        raise ValueError(f"{path} holds no config.json and {len(files)} .gguf files; name one of them")
    return None


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer.

    GGUF weights are dequantised, and the model is then an ordinary one that can be trained and saved.

    Raises:
        OSError: there is no such model. ValueError: a folder with several GGUF files. ImportError: the gguf extra is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    gguf = _gguf_file(model)
    if gguf is None:
        return (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            AutoTokenizer.from_pretrained(model),
        )
    folder, name = gguf
    options: dict[str, Any] = {"gguf_file": name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if hasattr(transformers, "GgufConfig"):  # 5.x may keep GGUF blocks packed, which have no geometry to read
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # 5.x goes on calling dequantised weights quantised and refuses to save them.
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    return loaded, tokenizer


def read_text(text: str | None, dataset: str | None = None, column: str = "text") -> str:
    """The text to train on: a file, a data set's column, or the English manual that ships with Python.

    Raises:
        ValueError: both a file and a data set, or a column the data set does not have. OSError: no such file.
    """
    if text is not None and dataset is not None:
        raise ValueError("give --text or --dataset, not both")
    if text is not None:
        return Path(text).read_text(encoding="utf-8")
    if dataset is not None:
        from datasets import load_dataset  # extra: data

        rows = load_dataset(dataset, split="train")
        if column not in rows.column_names:
            raise ValueError(f"the data set has no column {column!r}; it has {rows.column_names}")
        return "\n\n".join(rows[column])
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> Tensor:
    """The first `count` sequences of `length` tokens of a text, end to end: (count, length).

    Raises:
        ValueError: the text is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if ids.shape[0] < count * length:
        raise ValueError(f"the text gives {ids.shape[0]} tokens, {count} sequences of {length} need {count * length}")
    return ids[: count * length].view(count, length)
