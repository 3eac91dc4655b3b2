"""A later transformers, made by editing the one that is installed."""

import importlib.util
import inspect
import itertools
import linecache
import re
import sys
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType

_serial = itertools.count()


def edited(function: FunctionType, *replacements: tuple[str, str], readable: bool = True) -> FunctionType:
    """A function whose source has each pattern replaced, at least once each; defined in its module, as if it stood there.

    Args:
        readable: whether `linecache` knows the source, as it does of files and of notebooks' cells.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for pattern, text in replacements:
        source, found = re.subn(pattern, text, source)
        assert found, f"{pattern} is not in {function.__qualname__}"
    file = f"<edited {next(_serial)}>"
    if readable:
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict = {}
    exec(compile(source, file, "exec"), inspect.unwrap(function).__globals__, made)
    return made[function.__name__]


def edited_module(module: ModuleType, folder: Path, *replacements: tuple[str, str]) -> ModuleType:
    """A copy of a module with each pattern replaced, imported from a folder under a name beside the original's."""
    source = Path(module.__file__).read_text()
    for pattern, text in replacements:
        source, found = re.subn(pattern, text, source)
        assert found, f"{pattern} is not in {module.__name__}"
    name = f"{module.__name__}_edited_{next(_serial)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy
