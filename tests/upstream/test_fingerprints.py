"""The fingerprints: what counts and what does not, the same on every Python, and a table that has every release."""

import ast
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from hf_geoscale.integrations import fingerprints
from hf_geoscale.integrations.fingerprints import definition, digest, fingerprint
from hf_geoscale.integrations.known_sources import KNOWN, RELEASES, WALK

from . import collect

PLAIN = "@wraps(f)\ndef forward(self, x, y=1, *, z=None, **rest):\n    total = x + self.scale * 2\n    return g(total, k=z)\n"

SAMPLE = '''
@outer.decorator("name", flag=True)
async def sample(a, /, b: int = -1, *args, c=0x10, d, **kwargs) -> "nothing":
    """Documented."""
    first: list[int] = [x async for x in a if x is not None]
    u"text" "joined", b"\\x00\\xff", 1_000, 1e-6, 0.1, 2.5j, ..., True, None, 10**30, 1e400
    async with a as b, c(): await d
    for i, *rest in {**kwargs, "k": (yield)}: continue
    else: pass
    while not (y := f"{a!r:>{b}} and {c=}" f"{d}" "tail") < 3 <= 4: break
    try: del first[1:2, ..., ::3]
    except (ValueError, TypeError) as error: raise X from error
    finally: global g
    match a:
        case {"k": [1, *_], **more} | Point(x=0) if more: pass
    lambda p, *q, r=1, **s: p if q else (r @ s, not r, ~s, r[-1], {1, 2}, {k: v for k, v in s})
    assert a and b or c, "said"
    a.b.c += 1
    from .. import one as two
    class Inner(Base, metaclass=M): x: int
    return "\\N{GREEK SMALL LETTER ALPHA}\\ud800"
'''
"""A bit of everything that Python 3.10 can parse."""

DIGEST = "c9c854c57b4886b2"


def of(source: str) -> str:
    return digest(ast.parse(source).body[0])


class TestWalk:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("total = x", "\n    # said\n    total =(x)"),
            ("\n    total", '\n    """What it does."""\n    total'),
            ("x, y=1", "x: int, y: 'float'=1"),
            ("rest):", "rest) -> None:"),
            ("total = x", "total: int = x"),
            ("1, *,", "0x1, *,"),
        ],
    )
    def test_what_does_not_count(self, old, new):
        assert old in PLAIN
        assert of(PLAIN.replace(old, new, 1)) == of(PLAIN)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("x + self", "x - self"),
            ("x + self", "y + self"),
            ("self.scale", "self.scaling"),
            ("* 2", "* 2.0"),
            ("* 2", "* True"),
            ("y=1", "y=2"),
            ("y=1, *, z=None", "y=1, z=None"),
            ("k=z", "j=z"),
            ("k=z", "z"),
            ("@wraps(f)\n", ""),
            ("@wraps(f)", "@wraps(g)"),
            ("    return", "    total = total\n    return"),
            ("**rest", "**others"),
            ("forward", "backward"),
        ],
    )
    def test_what_counts(self, old, new):
        assert old in PLAIN
        assert of(PLAIN.replace(old, new, 1)) != of(PLAIN)

    def test_every_python_gives_the_same(self):
        """On the Python that runs this, and so on every one that CI runs it on."""
        assert of(SAMPLE) == DIGEST

    @pytest.mark.parametrize("minor", range(10, 15))
    def test_other_pythons_that_are_here(self, minor):
        found = shutil.which(f"python3.{minor}")
        runs = found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0
        if not runs or sys.version_info[:2] == (3, minor):
            pytest.skip(f"no other Python 3.{minor} here")
        code = (
            "import importlib.util, sys, ast\n"
            "spec = importlib.util.spec_from_file_location('fingerprints', sys.argv[1])\n"
            "module = sys.modules['fingerprints'] = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module.digest(ast.parse(sys.stdin.read()).body[0]))\n"
            "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
        )
        command = [found, "-c", code, fingerprints.__file__]
        out = subprocess.run(command, input=SAMPLE, capture_output=True, text=True, check=True).stdout
        assert out.split("\n")[:2] == [DIGEST, "[]"]


class TestFunctions:
    def test_wrappers_are_read_too(self):
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        found = fingerprint(LlamaRotaryEmbedding.forward)
        assert len(found.digests) == len(found.functions) >= 2
        assert None not in found.digests

    @pytest.mark.parametrize("other", [len, print, object(), type])
    def test_no_python_function_has_none(self, other):
        assert fingerprint(other) is None

    def test_a_second_look_reads_nothing(self, monkeypatch):
        def function():
            return 1

        first = fingerprint(function)
        monkeypatch.setattr(fingerprints, "_source", None)
        assert fingerprint(function) is first


def minors(text: str) -> set[tuple[int, int]]:
    """Minor releases of a text such as "4.57, 5.4 to 5.23"."""
    found: set[tuple[int, int]] = set()
    for part in text.split(", "):
        ends = [tuple(map(int, end.split("."))) for end in part.split(" to ")]
        found |= {minor for minor in EVERY if ends[0] <= minor <= ends[-1]}
    return found


EVERY = {(4, 57), *((5, minor) for minor in range(25)), (0, 6), (0, 7), (0, 8)}
SINCE = {"mellum": (5, 10)}
"""Minor releases, and those in which a model came that was not always there."""


class TestTable:
    def test_todays_walk_made_it(self):
        assert collect.walk_digest() == WALK

    def test_it_spans_what_the_package_supports(self):
        assert RELEASES["transformers"] == "{}.{} to {}.{}".format(*collect.OLDEST, *collect.NEWEST)
        pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        assert '"transformers>={}.{}.'.format(*collect.OLDEST) in pyproject
        assert '"liger-kernel>={}.{};'.format(*collect.LIGER_OLDEST) in pyproject

    def test_it_has_everything_that_the_fused_forwards_restate(self):
        paths = [f"{file[:-3].replace('/', '.')}:{name}" for file, names in collect.SOURCES.items() for name in names]
        assert sorted(KNOWN) == sorted(paths)

    @pytest.mark.parametrize("path", KNOWN)
    def test_it_has_every_release(self, path):
        """A release that is left out on purpose stands in `collect.LEFT_OUT`."""
        package = path.partition(".")[0]
        since = next((first for part, first in SINCE.items() if f".{part}." in path), (0, 0))
        wanted = {minor for minor in minors(RELEASES[package]) if minor >= since}
        assert set().union(*map(minors, KNOWN[path].values())) == wanted
        assert all(len(digest) == 16 for digest in KNOWN[path])
        assert not collect.LEFT_OUT

    @pytest.mark.parametrize("file", collect.SOURCES)
    def test_it_is_right_of_the_release_that_is_installed(self, file):
        package = "liger-kernel" if file.startswith("liger") else "transformers"
        if package == "liger-kernel":
            pytest.importorskip("liger_kernel")
        installed = tuple(map(int, version(package).split(".")[:2]))
        if installed > (collect.NEWEST if package == "transformers" else collect.LIGER_NEWEST):
            pytest.skip(f"{package} {version(package)} is newer than what was read")
        folder = Path(transformers.__file__).parents[1]
        if not (folder / file).exists():
            pytest.skip(f"{package} {version(package)} has no {file}")
        tree = ast.parse((folder / file).read_text())
        for name in collect.SOURCES[file]:
            known = KNOWN[f"{file[:-3].replace('/', '.')}:{name}"]
            assert installed in minors(known[digest(definition(tree, name))]), name
