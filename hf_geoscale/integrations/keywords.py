"""Keywords that transformers passes to attention modules and to the attention interface, under each release's names."""

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedAttentionError

CACHE_NAMES = ("past_key_values", "cache", "past_key_value")
"""Keywords of an attention module's cache: in transformers 4.57 to 5.23, in 5.24, and in code written for earlier ones."""


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among a call's keywords, under any of `CACHE_NAMES`; None without one."""
    return next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)


def refuse_paged_cache(options: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedAttentionError where a keyword carries the cache of transformers' continuous batching.

    The class tells, not the keyword: transformers 5.24 passes every cache as `cache`.
    """
    kind = type(cache_of(options))
    if any(base.__name__.startswith("Paged") for base in kind.__mro__):
        raise UnsupportedAttentionError(
            f"FP8 attention cannot read a paged cache ({where} got a {kind.__name__}), and neither can SDPA. Generate without "
            "continuous batching, or unpatch the model and use one of transformers' paged implementations"
        )
