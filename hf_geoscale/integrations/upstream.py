"""Every name of other packages that the package uses without a promise: private ones, and code that it restates or tells by name.

The list is `upstream_uses`, one row a kind of use. `tests/upstream/test_list.py` looks for private names in the sources and demands
a row for each. docs/upstream.md shows it (`python -m hf_geoscale.integrations.upstream`). `warn_of_missing` looks for the names
themselves when a model is patched.
"""

import logging
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .upstream_uses import USES, Use

logger = logging.getLogger(__name__)


def _found(path: str) -> bool | None:
    """Whether a private name is where it was; None where its module is not imported."""
    module, _, names = path.partition(":")
    here: Any = sys.modules.get(module)
    if here is None:
        return None
    try:
        for name in names.split("."):
            here = getattr(here, name.removesuffix("()"))
            here = here() if name.endswith("()") else here
    except AttributeError:
        return False
    return True


def missing() -> Iterator[tuple[Use, str]]:
    """Names that are gone from imported packages. Of several places that are written alike, one is enough."""
    for use in USES:
        by_name: dict[str, list[bool | None]] = {}
        for path in use.where:
            by_name.setdefault(path.rpartition(".")[2], []).append(_found(path))
        for name, found in by_name.items():
            if False in found and True not in found:
                yield use, name


@cache
def warn_of_missing() -> None:
    """Once a process: one warning for each name that is gone, with what happens instead."""
    for use, name in missing():
        try:
            release = version(use.package)
        except PackageNotFoundError:
            release = "here"
        logger.warning("geoscale: %s %s has no %s any more. %s", use.package, release, name, use.otherwise)


def to_markdown() -> str:
    """docs/upstream.md."""
    lines = [
        "# What the package takes from others without a promise",
        "",
        "Made by `python -m hf_geoscale.integrations.upstream > docs/upstream.md`.",
        "",
        "| package | names | used in | cause | read | when it changes |",
        "|---|---|---|---|---|---|",
    ]
    for use in USES:
        cells = (
            use.package,
            "`" + "`, `".join(use.names) + "`",
            ", ".join(use.files),
            use.cause,
            use.read,
            use.otherwise,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_markdown())
