"""The direction of imports, and what `import hf_geoscale` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_geoscale"

# room → (rooms it may import, third-party packages it may import)
ROOMS = {
    "geometry": (set(), {"torch"}),
    "scaling": ({"geometry", "config"}, {"torch"}),
    "kernels": ({"scaling.formats"}, {"torch", "triton"}),
    "stability": ({"geometry"}, {"torch", "matplotlib"}),
    "integrations": (
        {"geometry", "scaling", "kernels", "stability", "config", "errors", "registration"},
        {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "typing_extensions"},
    ),
    "cli": (
        {"geometry", "scaling", "kernels", "stability", "integrations", "config", "errors", ""},
        {"torch", "transformers", "safetensors", "peft", "typer", "rich", "matplotlib", "datasets", "huggingface_hub"},
    ),
}


def imports_of(path: Path):
    """(module, is_ours) of every import in a file, at any depth; ours without the package's name."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1]
                yield ".".join([*base, *module]), True
            else:
                yield node.module, False


def violations(path: Path) -> list[str]:
    room = path.relative_to(PACKAGE).parts[0]
    rooms, packages = ROOMS[room]
    found = []
    for module, ours in imports_of(path):
        if ours:
            allowed = module.split(".")[0] == room or any(module == r or module.startswith(r + ".") for r in rooms if r)
            allowed |= module == "" and "" in rooms
        else:
            top = module.split(".")[0]
            allowed = top in packages or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"{path.name} imports {module}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    files = sorted((PACKAGE / room).glob("**/*.py"))
    assert files
    assert [v for path in files for v in violations(path)] == []


def test_the_checker_sees_a_violation(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "geometry").mkdir()
    bad = tmp_path / "geometry" / "bad.py"
    bad.write_text("import transformers\nfrom ..scaling import formats\nfrom .spectral import gram\n")
    assert violations(bad) == ["bad.py imports transformers", "bad.py imports scaling"]


def test_importing_the_package_is_free():
    code = "import sys, hf_geoscale; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_resolve():
    import hf_geoscale

    for name in hf_geoscale.__all__:
        assert getattr(hf_geoscale, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_geoscale.no_such_name


def test_files_are_named_for_what_they_hold():
    names = {path.stem for path in PACKAGE.glob("**/*.py")}
    assert not names & {"utils", "helpers", "common", "misc"}
