"""Keywords that reach attention modules and the attention interface, under each release's names.

Read in transformers 4.57 to 5.24 (`TransformersKwargs`, `FlashAttentionKwargs`, the forwards of all families in docs/families.md,
`Trainer`), TRL 1.16, PEFT 0.21 and Liger-Kernel 0.8. Whatever a user gives `model(…)` and the model does not name arrives here.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UnsupportedAttentionError

CACHE_NAMES = ("past_key_values", "cache", "past_key_value")
"""Keywords of an attention module's cache: in transformers 4.57 to 5.23, in 5.24, and in code written for earlier ones."""

_PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Which documents a row holds; `visibility_of_call` reads the first three, and the others say the same again."""

_BOOKKEEPING = (
    *("cache_position", "use_cache", "logits_to_keep"),
    *("return_dict", "output_hidden_states", "output_router_logits"),  # what the model returns besides
)
_LOSS = (
    *("labels", "shift_labels", "num_items_in_batch", "ignore_index"),
    # Liger-Kernel's losses, which its forwards of models pass on to the attention too
    *("accum_dtype", "ce_weight", "chunk_mem_const", "final_logit_softcapping", "label_smoothing", "lse_square_scale"),
    *("reduction", "return_predicted_tokens", "return_token_accuracy", "return_z_loss", "use_token_scaling"),
)
_TOKENIZER = (
    *("token_type_ids", "mm_token_type_ids", "special_tokens_mask", "offset_mapping", "length"),
    *("overflowing_tokens", "num_truncated_tokens", "overflow_to_sample_mapping"),
)
IGNORABLE = frozenset((*_PACKING, *_BOOKKEEPING, *_LOSS, *_TOKENIZER))
"""Keywords that change nothing in an attention layer beside what its mask and its positions say."""

NOT_HONOURED = {
    "position_bias": "a position bias on the logits",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "output_attentions": "returned attention probabilities",
    "read_index": "a paged cache",
    "write_index": "a paged cache",
    "block_table": "a paged cache",
}
"""Keywords that change the result and that FP8 attention does not have, in words."""


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among a call's keywords, under any of `CACHE_NAMES`; None without one."""
    for name in CACHE_NAMES:  # asked in every call: no function is called
        if name in call and call[name] is not None:
            return call[name]
    return None


def unknown_keywords(call: Mapping[str, Any], known: frozenset[str] = frozenset()) -> list[str]:
    """Keywords with a value that are neither ignorable nor known. None is no value: transformers spells out what is absent.

    False is none either for what `NOT_HONOURED` names, whose meaning is known; of an unknown flag it may be the unusual value.
    """
    found = []
    for name in call:  # torch.compile traces this, and knows no difference of a dict's keys
        value = call[name]
        ignorable = name in IGNORABLE or name in known or value is None
        if not ignorable and not (value is False and name in NOT_HONOURED):
            found.append(name)
    return sorted(found) if found else found


def parameters(function: Any) -> frozenset[str]:
    """Names of a function's parameters; none where it does not tell."""
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


def keywords_of_losses(modules: Iterable[Any]) -> frozenset[str]:
    """Names that the loss functions of the models among these modules take; users' own losses may take any."""
    losses = [getattr(module, "loss_function", None) for module in modules]
    return frozenset().union(*(parameters(loss) for loss in losses if callable(loss)))


def refuse_paged_cache(options: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedAttentionError where a keyword carries the cache of transformers' continuous batching.

    The class tells, not the keyword: transformers 5.24 passes every cache as `cache`.
    """
    cache = cache_of(options)
    if cache is None:
        return
    kind = type(cache)
    if any(base.__name__.startswith("Paged") for base in kind.__mro__):
        raise UnsupportedAttentionError(
            f"FP8 attention cannot read a paged cache ({where} got a {kind.__name__}), and neither can SDPA. Generate without "
            "continuous batching, or unpatch the model and use one of transformers' paged implementations"
        )
