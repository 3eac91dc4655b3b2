"""The list of what is used without a promise: complete, shown in the docs, and heard when a name is gone."""

import ast
import logging
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from hf_geoscale import patch_model
from hf_geoscale.integrations import front_end, projections, upstream
from hf_geoscale.integrations.sharding import refuse_parallelism
from hf_geoscale.integrations.upstream_uses import USES, Use
from hf_geoscale.kernels import backend

from ..conftest import tiny_model, tokens

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_geoscale"
LISTS = {PACKAGE / "integrations" / "upstream.py", PACKAGE / "integrations" / "upstream_uses.py"}
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
THEIRS = {
    name for x in (torch.nn.Module(), torch.zeros(1), torch.nn.Parameter) for name in dir(x) if PRIVATE.fullmatch(name)
}
"""Private names of torch's modules and tensors: theirs, even where a class of ours has one alike."""

FILES = sorted(set(PACKAGE.rglob("*.py")) - LISTS)
PUBLIC = {("torch.utils._python_dispatch", "TorchDispatchMode")}


def names_made_by(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables, and attributes of its own classes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if PRIVATE.fullmatch(name)}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(source: str, ours: set[str]) -> set[str]:
    """Private names of other packages in a source: imported, read as attributes, or spelt in a string."""
    found, tree = set(), ast.parse(source)
    parts_of_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in parts_of_texts:
            continue
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if PRIVATE.fullmatch(part)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".") if PRIVATE.fullmatch(part)}
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and not is_self(node.value):
            found |= {node.attr} if node.attr in THEIRS or node.attr not in ours else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            found |= {node.value} if node.value in THEIRS or node.value not in ours else set()
    return found


SOURCES = {file: file.read_text() for file in FILES}
OURS = set().union(*(names_made_by(ast.parse(source)) for source in SOURCES.values())) | {
    "_replace",
    "_asdict",
    "_foreach",
}


def listed(file: Path) -> set[str]:
    """Parts of the names that the list has for a file."""
    name = file.relative_to(PACKAGE).with_suffix("").as_posix()
    uses = [use for use in USES if any(name == f or name.startswith(f"{f}/") for f in use.files)]
    return {part for use in uses for text in use.names for part in text.split(".")}


class TestComplete:
    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
    def test_every_private_name_has_a_row(self, file):
        assert private_names(SOURCES[file], OURS) - listed(file) == set()

    @pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.package}:{use.names[0]}")
    def test_every_row_is_in_use(self, use):
        """Private names of the list stand in the files that it gives, and the files are there."""
        texts = {}
        for name in use.files:
            place = PACKAGE / name
            files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            texts[name] = "".join(file.read_text() for file in files)
        for name in [n for n in use.names if PRIVATE.fullmatch(n)]:
            assert any(
                name in text or name.removeprefix("_global_").removesuffix("_hooks") in text for text in texts.values()
            )

    @pytest.mark.parametrize(
        "source",
        [
            "from torch._dynamo import config",
            "import transformers._private",
            "from transformers import _name",
            "def f(model): return model._somebodys",
            "def f(model): return getattr(model, '_somebodys')",
            "class A:\n    def __init__(self, m):\n        self._version = m._version",
        ],
    )
    def test_the_search_finds(self, source):
        assert private_names(source, names_made_by(ast.parse(source)))

    def test_the_search_leaves_our_own(self):
        source = "class A:\n    def _own(self): return self._x\ndef f(a): return a._own()\n"
        assert not private_names(source, names_made_by(ast.parse(source)))

    def test_the_page_shows_it(self):
        assert (ROOT / "docs" / "upstream.md").read_text() == upstream.to_markdown() + "\n"


class TestHeard:
    def test_nothing_is_missing_here(self):
        assert list(upstream.missing()) == []
        looked = [upstream._found(path) for use in USES for path in use.where]
        assert looked.count(True) > len(looked) / 2

    def test_a_name_that_is_gone_is_one_warning(self, monkeypatch, caplog):
        gone = types.ModuleType("of_a_stand_in")
        gone.still = object()
        monkeypatch.setitem(sys.modules, "of_a_stand_in", gone)
        use = Use(
            "pytest", "1", ("_gone",), ("errors",), "", "Nothing runs.", ("of_a_stand_in:still", "of_a_stand_in:_gone")
        )
        monkeypatch.setattr(upstream, "USES", (use,))
        upstream.warn_of_missing.cache_clear()
        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            for _ in range(2):
                patch_model(tiny_model("llama"), backend="reference")
        upstream.warn_of_missing.cache_clear()
        (said,) = [record.getMessage() for record in caplog.records if "any more" in record.getMessage()]
        assert said == f"geoscale: pytest {pytest.__version__} has no of_a_stand_in:_gone any more. Nothing runs."

    def test_what_is_not_imported_is_not_looked_for(self):
        assert upstream._found("never.imported:_name") is None


class TestWithoutThem:
    """Stand-ins for releases that have dropped a name."""

    @pytest.mark.parametrize("name", ["_modes", "_transforms"])
    def test_kernels_go_through_the_dispatcher(self, monkeypatch, name):
        fused = pytest.importorskip("hf_geoscale.kernels.fused", exc_type=ImportError)
        assert fused._nobody_watches(torch.zeros(1))
        monkeypatch.setattr(fused, name, None)
        assert not fused._nobody_watches(torch.zeros(1))

    def test_no_kernels_without_a_way_below_autograd(self, monkeypatch):
        monkeypatch.delattr(torch._C, "_AutoDispatchBelowAutograd")
        monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
        assert "_AutoDispatchBelowAutograd" in backend.triton_missing(torch.device("cuda"))

    def test_projections_are_called_one_by_one(self, monkeypatch):
        linear = torch.nn.Linear(2, 2)
        assert projections.is_bare(linear)
        monkeypatch.setattr(projections, "_GLOBAL_HOOKS", (None, {}, {}, {}))
        assert not projections.is_bare(linear)

    def test_a_parallelism_of_other_names_is_refused(self, monkeypatch):
        from accelerate.state import AcceleratorState

        from hf_geoscale import UnsupportedModelError

        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", types.SimpleNamespace(tensor=2))
        with pytest.raises(UnsupportedModelError, match="SimpleNamespace has no tp_size"):
            refuse_parallelism()

    def test_a_triton_that_nobody_read_is_said_once(self, monkeypatch, caplog):
        launcher = pytest.importorskip("hf_geoscale.kernels.launcher", exc_type=ImportError)
        monkeypatch.setattr(launcher, "_FOLLOWED", False)
        monkeypatch.setattr(launcher, "knobs", types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False)))
        launcher._say_that_triton_launches.cache_clear()
        kernel = launcher.DirectKernel(_Kernel())
        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            kernel[(1,)]()
            kernel[(1,)]()
        launcher._say_that_triton_launches.cache_clear()
        assert [record.getMessage() for record in caplog.records if "launches each kernel" in record.getMessage()][
            1:
        ] == []
        assert "launches each kernel" in caplog.text

    def test_a_config_without_the_name_is_not_patched(self):
        """An attention that somebody built of other parts."""
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(1, 8)
        model(ids, use_cache=False)
        attention = model.model.layers[0].self_attn
        attention.__dict__["config"] = types.SimpleNamespace()
        assert not front_end._is_patched(attention)


class _Kernel:
    """A Triton kernel that does nothing."""

    pre_run_hooks = ()

    def __getitem__(self, grid):
        return lambda *arguments, **options: None
