"""Whether the files of weights in a folder are whole, without reading the weights."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the text file that Git LFS leaves in place of a file it did not download."""

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _shards(index: Path) -> list[str] | None:
    """Names of the shards that an index lists; None where it is no index."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def file_problem(path: Path) -> str | None:
    """The fault of one file, its name first: missing, empty, a Git LFS pointer, truncated. None for a file without fault.

    Of a .safetensors file the header and the size are read, of a file by torch.save the directory at its end.
    """
    if not path.is_file():
        return f"{path} is missing"
    with path.open("rb") as file:
        first = file.read(len(LFS_POINTER))
    if first == LFS_POINTER:
        return f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if not first:
        return f"{path} is empty"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{path} is damaged or truncated ({error})"
    elif first.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"{path} is damaged or truncated"
    return None


def weights_problem(folder: Path) -> str | None:
    """The fault of the weights that transformers or PEFT would load from a folder. None for weights without fault.

    Like transformers, takes the first that is there of SINGLE_FILES and INDEX_FILES, .safetensors before .bin.
    """
    for single, index in zip(SINGLE_FILES, (*INDEX_FILES, None, None), strict=True):
        if (folder / single).exists():
            return file_problem(folder / single)
        if index is not None and (folder / index).exists():
            shards = _shards(folder / index)
            if shards is None:
                return file_problem(folder / index) or f"{folder / index} is no index of weights"
            return next((p for p in (file_problem(folder / shard) for shard in shards) if p is not None), None)
    return f"{folder} holds no weights (none of {', '.join(SINGLE_FILES)})"
