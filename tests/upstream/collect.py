"""Read the fingerprints that `known_sources.py` holds off wheels of transformers and Liger-Kernel, without importing them.

    python tests/upstream/collect.py FOLDER            # write the table anew
    python tests/upstream/collect.py FOLDER --check    # fail where it differs
    python tests/upstream/collect.py FOLDER --download # first fetch one wheel of every supported minor release

A new release: read what changed in the functions that `SOURCES` names, teach `front_end` to serve it or leave it out of the table
with `LEFT_OUT`, raise `NEWEST`, run this, and run the tests with that release installed. Standard library and pip only.
"""

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_geoscale" / "integrations"
WHEELS = ROOT / ".wheels"
"""Where `make upstream` keeps them."""
TABLE = PACKAGE / "known_sources.py"
OLDEST, NEWEST = (4, 57), (5, 24)
"""Minor releases of transformers: the oldest that pyproject.toml allows, and the newest that was read."""

LIGER_OLDEST, LIGER_NEWEST = (0, 6), (0, 8)
"""Of Liger-Kernel, whose wheels are small: every release between them."""
LEFT_OUT: frozenset[tuple[str, str]] = frozenset()
"""(path, digest) of what a release has and no fused forward serves."""


def _rotated(*names: str) -> tuple[str, ...]:
    return (*names, "apply_rotary_pos_emb", "rotate_half")


SOURCES = {
    "transformers/models/llama/modeling_llama.py": _rotated("LlamaAttention.forward", "LlamaRotaryEmbedding.forward"),
    "transformers/models/mistral/modeling_mistral.py": _rotated(
        "MistralAttention.forward", "MistralRotaryEmbedding.forward"
    ),
    "transformers/models/qwen2/modeling_qwen2.py": _rotated("Qwen2Attention.forward", "Qwen2RotaryEmbedding.forward"),
    "transformers/models/qwen3/modeling_qwen3.py": _rotated(
        "Qwen3Attention.forward", "Qwen3RotaryEmbedding.forward", "Qwen3RMSNorm.forward"
    ),
    "transformers/models/qwen3_moe/modeling_qwen3_moe.py": _rotated(
        "Qwen3MoeAttention.forward", "Qwen3MoeRotaryEmbedding.forward", "Qwen3MoeRMSNorm.forward"
    ),
    "transformers/models/dots1/modeling_dots1.py": _rotated(
        "Dots1Attention.forward", "Dots1RotaryEmbedding.forward", "Dots1RMSNorm.forward"
    ),
    "transformers/models/mellum/modeling_mellum.py": _rotated(  # since 5.10
        "MellumAttention.forward", "MellumRotaryEmbedding.forward", "MellumRMSNorm.forward"
    ),
    "transformers/models/gpt2/modeling_gpt2.py": ("GPT2Attention.forward",),
    "transformers/cache_utils.py": ("Cache.update", "DynamicLayer.update", "DynamicSlidingWindowLayer.update"),
    "transformers/utils/deprecation.py": ("deprecate_kwarg.wrapper.wrapped_func",),
    "transformers/modeling_rope_utils.py": ("dynamic_rope_update.wrapper",),
    "liger_kernel/transformers/rope.py": ("liger_rotary_pos_emb",),
}
"""What a fused forward restates or looks through, by file of a wheel."""


def _fingerprints() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fingerprints", PACKAGE / "fingerprints.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fingerprints"] = module
    spec.loader.exec_module(module)
    return module


FINGERPRINTS = _fingerprints()


def walk_digest() -> str:
    """Of the code that makes digests: a table made by other code is another table."""
    tree = ast.parse((PACKAGE / "fingerprints.py").read_text())
    used = [
        node for node in tree.body if getattr(node, "name", "") in ("_constant", "_joined", "_body", "_form", "digest")
    ]
    constants = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id.startswith("_UN")]
    return FINGERPRINTS.digest(ast.Module([*constants, *used], []))


def release(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.search(r"-([\d.]+)-py3", wheel.name)[1].split("."))


def digests(wheel: Path) -> Iterator[tuple[str, str]]:
    """(path, digest) of every definition in `SOURCES` that a wheel has; a path is `module:names`."""
    with zipfile.ZipFile(wheel) as files:
        present = set(files.namelist())
        for file, names in SOURCES.items():
            if file not in present:
                continue
            tree = ast.parse(files.read(file).decode())
            for name in names:
                node = FINGERPRINTS.definition(tree, name)
                if node is not None:
                    yield f"{file[:-3].replace('/', '.')}:{name}", FINGERPRINTS.digest(node)


def ranges(releases: set[tuple[int, int]], everywhere: list[tuple[int, int]]) -> str:
    """Minor releases in words, neighbours among all that were read put together: "4.57, 5.4 to 5.23"."""
    groups: list[list[tuple[int, int]]] = []
    for minor in sorted(releases):
        if groups and everywhere.index(groups[-1][-1]) + 1 == everywhere.index(minor):
            groups[-1].append(minor)
        else:
            groups.append([minor])
    texts = [[f"{major}.{minor}" for major, minor in group] for group in groups]
    return ", ".join(group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in texts)


def table(wheels: list[Path]) -> str:
    """The text of `known_sources.py`."""
    found: dict[str, dict[str, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
    read: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for wheel in wheels:
        minor = release(wheel)[:2]
        read[wheel.name.partition("-")[0]].add(minor)
        for path, digest in digests(wheel):
            if (path.partition(":")[2], digest) not in LEFT_OUT:
                found[path][digest].add(minor)
    lines = [
        '"""Fingerprints of upstream code that the fused forwards restate, by release. Made by tests/upstream/collect.py."""',
        "",
        f'WALK = "{walk_digest()}"',
        '"""Of the code that made them."""',
        "",
        "RELEASES = {",
        *(f'    "{package}": "{ranges(minors, sorted(minors))}",' for package, minors in sorted(read.items())),
        "}",
        '"""Minor releases that were read."""',
        "",
        "KNOWN = {",
    ]
    for path, by_digest in sorted(found.items()):
        everywhere = sorted(read["transformers" if path.startswith("transformers") else "liger_kernel"])
        lines.append(f'    "{path}": {{')
        ordered = sorted(by_digest.items(), key=lambda item: min(item[1]))
        lines += [f'        "{digest}": "{ranges(minors, everywhere)}",' for digest, minors in ordered]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def versions(package: str) -> list[tuple[int, ...]]:
    """The released versions of a package, oldest first, as pip lists them."""
    pip = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(pip, check=True, capture_output=True, text=True).stdout
    texts = re.search(r"Available versions: (.*)", listed)[1].split(", ")
    return sorted(tuple(map(int, text.split("."))) for text in texts if re.fullmatch(r"[\d.]+", text))


def download(folder: Path) -> None:
    """The newest wheel of every supported minor release, and every one of Liger-Kernel, as far as they are not there yet."""
    newest_of = {version[:2]: version for version in versions("transformers") if OLDEST <= version[:2] <= NEWEST}
    liger = [version for version in versions("liger-kernel") if LIGER_OLDEST <= version[:2] <= LIGER_NEWEST]
    for package, wanted in (("transformers", newest_of.values()), ("liger-kernel", liger)):
        for version in wanted:
            text = ".".join(map(str, version))
            if not list(folder.glob(f"{package.replace('-', '_')}-{text}-*.whl")):
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
                subprocess.run([*pip, f"{package}=={text}"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of wheels")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--download", action="store_true", help="fetch the wheels that are missing, with pip")
    options = parser.parse_args()
    if options.download:
        options.folder.mkdir(parents=True, exist_ok=True)
        download(options.folder)
    text = table(sorted(options.folder.glob("*.whl"), key=release))
    if not options.check:
        TABLE.write_text(text)
    elif TABLE.read_text() != text:
        sys.exit(f"{TABLE.name} is not what {options.folder} gives: run this without --check and read what changed")


if __name__ == "__main__":
    main()
