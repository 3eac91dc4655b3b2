"""Text to train on: a file, a data set's column, or the manual that ships with Python."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .failures import InputError, condensed, require
from .sources import ask_hub

DEFAULT_TEXT = "the English manual that ships with Python (pydoc_data.topics)"


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{name} is a folder, and --text takes one text file (a folder of data: --dataset {name})")
    if not path.exists():
        raise InputError(f"there is no text file {name}")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in data):
        convert = f"iconv -f UTF-16 -t UTF-8 {name} > utf8.txt"
        raise InputError(f"{name} is not UTF-8 text: it looks like UTF-16, or binary. If it is UTF-16: {convert}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        convert = f"iconv -f LATIN1 -t UTF-8 {name} > utf8.txt"
        raise InputError(
            f"{name} is not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start}). If it is Latin-1: {convert}"
        ) from error


def _rows(dataset: str, split: str) -> Any:
    """A split of a data set. Raises InputError for one that cannot be loaded."""
    require("datasets", "--dataset")
    import datasets

    path = Path(dataset).expanduser()
    if path.is_file():
        raise InputError(f"{dataset} is a file, and --dataset takes its folder or a Hub id")
    if not path.exists():
        cached = Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
        ask_hub(dataset, "dataset", cached.exists())
    try:
        found = datasets.load_dataset(str(path) if path.exists() else dataset)
    except Exception as error:  # of a dozen kinds, all about the data set
        raise InputError(f"the data set {dataset} cannot be loaded: {condensed(error.__cause__ or error)}") from error
    if split not in found:
        raise InputError(f"the data set {dataset} has no split {split!r}; it has {sorted(found)}: choose with --split")
    return found[split]


def _column(dataset: str, split: str, column: str) -> str:
    rows = _rows(dataset, split)
    if column not in rows.column_names:
        raise InputError(
            f"the data set {dataset} has no column {column!r}; it has {rows.column_names}: choose with --column"
        )
    values = rows[column]
    for index, value in enumerate(values):
        if isinstance(value, str):
            continue
        where = f"row {index} of column {column!r} of the data set {dataset}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise InputError(
                f"{where} is a chat (a list of messages), and text is needed: render it with the tokenizer's "
                "apply_chat_template into a column of text, or train with TRL (examples/sft_trainer.py)"
            )
        if value is None:
            raise InputError(f"{where} is empty (None): leave such rows out, or fill them")
        raise InputError(f"{where} is of type {type(value).__name__}, and text is needed: choose another with --column")
    return "\n\n".join(values)


def read_text(text: str | None, dataset: str | None = None, column: str = "text", split: str = "train") -> str:
    """The text to train on: a file in UTF-8, a data set's column, or the English manual that ships with Python.

    Raises:
        InputError: both a file and a data set; a file that is missing, a folder, empty or in another encoding; a data set,
            split, column or row that cannot be used.
    """
    if text is not None and dataset is not None:
        raise InputError("give --text or --dataset, not both")
    if text is None and dataset is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    words = _file(text) if text is not None else _column(dataset or "", split, column)
    if not words.strip():
        raise InputError(f"{text or dataset} holds no text")
    return words


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> Tensor:
    """The first `count` sequences of `length` tokens of a text, end to end: (count, length).

    Raises:
        InputError: the text is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if ids.shape[0] < count * length:
        raise InputError(
            f"the text gives {ids.shape[0]} tokens, {count} sequences of {length} need {count * length}: "
            "give more text or a shorter --length"
        )
    return ids[: count * length].view(count, length)
