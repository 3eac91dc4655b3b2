"""Models and tokenizers from the Hub, a folder or a file; every error names the model and the remedy."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..integrations.decoders import FAMILIES
from ..integrations.refusals import REFUSED
from ..integrations.towers import text_config
from .corpus import read_text, token_blocks
from .failures import InputError, condensed, require
from .sources import ModelSource, find_model
from .weight_files import INDEX_FILES, SINGLE_FILES, file_problem, weights_problem

logger = logging.getLogger(__name__)

TEXT_FILES = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")

__all__ = ["check_length", "load", "load_model", "load_tokenizer", "read_text", "refuse_unsupported", "token_blocks"]


@contextmanager
def _blamed(source: ModelSource, part: str) -> Iterator[None]:
    """Every error of transformers while it reads the files of a model becomes an InputError that names the model or the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if source.gguf_file is not None:
            path = Path(source.location) / source.gguf_file
            raise InputError(
                f"{path} cannot be read: it is damaged, truncated, or of a kind that transformers {transformers.__version__} "
                f"does not know ({condensed(error)})"
            ) from error
        if source.folder is not None and (problem := _files_problem(source.folder)) is not None:
            raise InputError(problem) from error
        raise InputError(f"transformers cannot load the {part} of {source.name}: {condensed(error)}") from error


def _files_problem(folder: Path, names: tuple[str, ...] = TEXT_FILES) -> str | None:
    """The first of some small files, or of the weights, that is empty, damaged or a Git LFS pointer; None where none is."""
    for name in names:
        if (folder / name).exists() and (problem := file_problem(folder / name)) is not None:
            return problem
    has_weights = any((folder / name).exists() for name in (*SINGLE_FILES, *INDEX_FILES))
    return weights_problem(folder) if has_weights else None


def _check_files(source: ModelSource) -> None:
    """Damaged weights end a load before it begins, not minutes later at the seventh shard."""
    path = Path(source.location)
    if not path.is_dir():
        return
    file = source.gguf_file
    problem = _files_problem(path, ("config.json",)) if file is None else file_problem(path / file)
    if problem is not None:
        raise InputError(problem)


def refuse_unsupported(config: Any, name: str, remedy: str) -> None:
    """Raise InputError unless a configuration is of a family whose attention has certificates.

    Args:
        remedy: end of the message, with the command's alternative; may be empty.
    """
    kind = config.model_type
    if kind in FAMILIES or text_config(config) is not config:  # of a multimodal model patch_model names the part
        return
    reason = REFUSED.get(kind, "its attention geometry is unknown")
    raise InputError(f"{name}: {kind} models are not supported: {reason}{remedy}")


def check_length(config: Any, length: int) -> None:
    """Raise InputError for sequences longer than learned position embeddings reach; rotary ones have no such end."""
    most = getattr(config, "max_position_embeddings", None)
    rotary = any(hasattr(config, name) for name in ("rope_parameters", "rope_theta", "rotary_dim"))
    if most is not None and length > most and not rotary:
        raise InputError(f"--length {length} is more than the {most} positions of this {config.model_type} model")


def _read_config(source: ModelSource) -> Any:
    with _blamed(source, "configuration"):
        try:
            return AutoConfig.from_pretrained(source.location, **source.options)
        except (KeyError, ValueError) as error:
            if "does not recognize this architecture" not in str(error):
                raise
            kind = str(error).partition("model type `")[2].partition("`")[0]
            raise InputError(
                f"{source.name} is a {kind} model, which transformers {transformers.__version__} does not know: "
                "a later release may"
            ) from error


def _load_gguf(source: ModelSource) -> PreTrainedModel:
    """GGUF weights, dequantised: an ordinary model that can be trained and saved."""
    require("gguf", "a .gguf file")
    options: dict[str, Any] = {"gguf_file": source.gguf_file}
    if hasattr(transformers, "GgufConfig"):  # 5.x may keep GGUF blocks packed, which have no geometry to read
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _blamed(source, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **options)
    # 5.x goes on calling dequantised weights quantised and refuses to save them.
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    return loaded


def _load_adapter(source: ModelSource, base: str, patchable: bool, remedy: str) -> PreTrainedModel:
    """An adapter merged into the model it was trained on, which is then an ordinary one."""
    require("peft", f"{source.name}, a PEFT adapter,")
    from peft import PeftModel

    try:
        model = load_model(base, patchable, remedy)
    except InputError as error:
        raise InputError(f"{source.name} is a PEFT adapter of {base}, which cannot be loaded: {error}") from error
    with _blamed(source, "adapter"):
        adapted = PeftModel.from_pretrained(model, source.location, **source.options)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise InputError(f"{source.name} is a PEFT adapter of kind {kind}, which cannot be merged into {base}")
    logger.warning("%s is a PEFT adapter: merged into its base, %s", source.name, base)
    return adapted.merge_and_unload().requires_grad_(True)  # PEFT froze the base


def load_model(model: str, patchable: bool = False, remedy: str = "") -> PreTrainedModel:
    """A causal language model in float32. An adapter is merged, GGUF weights are dequantised.

    Args:
        patchable: refuse a family without certificates, before its weights are read; `remedy` ends the message.

    Raises:
        InputError: there is no such model, its files are damaged, transformers cannot load it, or gguf or PEFT is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    source = find_model(model)
    _check_files(source)
    if source.gguf_file is not None:
        loaded = _load_gguf(source)
        if patchable:
            refuse_unsupported(loaded.config, model, remedy)
        return loaded
    if (base := source.adapter_base) is not None:
        return _load_adapter(source, base, patchable, remedy)
    config = _read_config(source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{model} is a {config.model_type} model, and transformers has no causal language model of that kind"
        )
    if patchable:
        refuse_unsupported(config, model, remedy)
    with _blamed(source, "model"):
        return AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **source.options)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; of an adapter without one, that of its base.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    source = find_model(model)
    if source.gguf_file is not None:
        require("gguf", "a .gguf file")
        with _blamed(source, "tokenizer"):
            return AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    folder = Path(source.location)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        if (base := source.adapter_base) is not None:
            return load_tokenizer(base)
        raise InputError(
            f"{model} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of its base model there"
        )
    with _blamed(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.location, **source.options)


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer. Raises InputError, as `load_model` and `load_tokenizer` do."""
    return load_model(model), load_tokenizer(model)
