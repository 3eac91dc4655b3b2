"""Where the model that a user names lies: a folder, a GGUF file, an adapter's folder, or the Hub."""

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .failures import InputError, condensed

HUB_TIMEOUT = 5.0
"""Seconds to wait for the Hub's first answer. A guess."""


@dataclass(frozen=True)
class ModelSource:
    """Arguments of `from_pretrained`: a folder or a Hub id, and options."""

    name: str  # as the user gave it
    location: str
    gguf_file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """Where the files lie on this machine; None where nothing was downloaded yet."""
        if Path(self.location).is_dir():
            return Path(self.location)
        cached = _cached(self.location)
        return None if cached is None else cached.parent

    @property
    def adapter_base(self) -> str | None:
        """The model that a folder of a PEFT adapter, without a model of its own, was trained on; None for a model.

        Raises:
            InputError: adapter_config.json cannot be read, or names no model.
        """
        folder = self.folder
        if folder is None or (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
            return None
        path = folder / "adapter_config.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} names no base model: put its folder or Hub id there") from error


def _cached(name: str) -> Path | None:
    """A configuration of a Hub model in the cache; None too where the name cannot be one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found)
    return None


def _similar(path: Path) -> str:
    """A question after a folder of nearly the same name, if there is one."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _from_folder(name: str, path: Path) -> ModelSource:
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return ModelSource(name, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource(name, str(path), files[0].name)
    found = f": {', '.join(file.name for file in files)}; name one of them" if files else ""
    raise InputError(
        f"{path} holds no model: no config.json, no adapter_config.json and {len(files)} .gguf files{found}"
    )


def ask_hub(name: str, kind: Literal["model", "dataset"], cached: bool) -> Any | None:
    """The Hub's record of a model or data set that is no folder here; None where it cannot be reached, and a copy is cached.

    Asks once, with a short timeout: `from_pretrained` and `load_dataset` try again for the better part of a minute.

    Raises:
        InputError: it is no Hub id, the Hub has none, or cannot be reached and nothing is cached.
    """
    path = Path(name).expanduser()
    missing = f"there is no folder {name}"
    try:
        if path.is_absolute() or path.suffix == ".gguf" or name.startswith((".", "~")):
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        missing = f"there is no file {name}" if path.suffix == ".gguf" else missing
        raise InputError(f"{missing}, and a Hub id is NAME or ORGANISATION/NAME.{_similar(path)}") from None
    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise InputError(
            f"{missing}, and the Hub has no such {kind}, or a private one (`hf auth login`).{_similar(path)}"
        ) from None
    except HfHubHTTPError:  # reached; the library that loads it explains the refusal
        return None
    except (
        Exception
    ) as error:  # no network, or told to do without: httpx or requests, by the release of huggingface_hub
        if not cached:
            raise InputError(f"{missing}, and the Hub cannot be asked ({condensed(error)}).{_similar(path)}") from error
        return None


def _from_hub(name: str) -> ModelSource:
    found = ask_hub(name, "model", _cached(name) is not None)
    if found is None:
        cached = {} if _cached(name) is None else {"local_files_only": True}  # else from_pretrained tries for long
        return ModelSource(name, name, options=cached)
    files = {file.rfilename for file in found.siblings or ()}
    if "config.json" not in files and "adapter_config.json" in files:
        hf_hub_download(name, "adapter_config.json")  # tells the base model
    elif "config.json" not in files and (gguf := sorted(file for file in files if file.endswith(".gguf"))):
        raise InputError(
            f"{name} holds .gguf files alone: `hf download {name} {gguf[0]} --local-dir .`, then give the file"
        )
    return ModelSource(name, name)


def find_model(name: str) -> ModelSource:
    """Where a model lies.

    Raises:
        InputError: the name is empty, nothing is there, or a folder without a model, or with several GGUF files.
    """
    if not name.strip():
        raise InputError("the model's name is empty: give a folder, a .gguf file or a Hub id")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource(name, str(path.parent), path.name)
        raise InputError(f"{name} is a file; name its folder, a .gguf file or a Hub id")
    return _from_folder(name, path) if path.is_dir() else _from_hub(name)
