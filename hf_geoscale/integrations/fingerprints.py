"""Fingerprints of Python functions: of what their sources say, the same on every supported Python.

Standard library only, and nothing of this package: `tests/upstream/collect.py` loads the file alone.
"""

import ast
import hashlib
import json
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

_UNREAD = frozenset(("annotation", "returns", "type_comment", "type_params", "ctx", "kind"))
"""Fields of the syntax tree without a meaning of their own: hints, the u of u"", and what the structure tells anyway."""

_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

Form = str | list["Form"]


def _constant(value: object) -> Form:
    kind = type(value).__name__
    if isinstance(value, bool) or value is None or value is ...:
        return [kind, repr(value)]
    if isinstance(value, int):
        return [kind, format(value, "x")]
    if isinstance(value, float):
        return [kind, value.hex()]
    if isinstance(value, complex):
        return [kind, value.real.hex(), value.imag.hex()]
    return [kind, value.hex() if isinstance(value, bytes) else str(value)]


def _joined(values: list[ast.expr]) -> Iterator[ast.expr]:
    """The parts of an f-string, neighbouring texts put together: Pythons divide them differently."""
    text = ""
    for value in values:
        if isinstance(value, ast.Constant):
            text += str(value.value)
            continue
        if text:
            yield ast.Constant(text)
        yield value
        text = ""
    if text:
        yield ast.Constant(text)


def _body(node: Any) -> list[ast.stmt]:
    """Statements of a function or class without its docstring."""
    first = node.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str
    )
    return node.body[1:] if documented else node.body


def _form(node: Any) -> Form:
    """A part of a syntax tree as nested lists of strings; fields that are absent or empty are left out."""
    if isinstance(node, list):
        return [_form(part) for part in node]
    if not isinstance(node, ast.AST):
        return [type(node).__name__, str(node)]
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return _form(ast.Assign(targets=[node.target], value=node.value))
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _UNREAD}
    if isinstance(node, _DOCUMENTED):
        fields["body"] = _body(node)
    if isinstance(node, ast.JoinedStr):
        fields["values"] = list(_joined(node.values))
    kept = [[name, _form(value)] for name, value in sorted(fields.items()) if value is not None and value != []]
    return [type(node).__name__, *kept]


def digest(node: ast.AST) -> str:
    """64 bits, as hexadecimal digits, of what a part of a syntax tree says.

    Names, constants, structure and decorators count. Docstrings, hints, comments and formatting do not.
    """
    text = json.dumps(_form(node), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def definition(tree: ast.AST, path: str) -> ast.AST | None:
    """The function or class at a dotted path of names in a syntax tree, nested functions included; None if it is not there."""
    node: Any = tree
    for name in path.split("."):
        found = [part for part in node.body if isinstance(part, _DOCUMENTED) and part.name == name]
        if not found:
            return None
        node = found[-1]
    return node


@lru_cache(maxsize=8)
def _compiled(text: str) -> tuple[ast.Module, CodeType] | None:
    try:
        tree = ast.parse(text)
        return tree, compile(tree, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether two compilations by this Python do the same."""
    of_both = [(x.co_code, x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars) for x in (code, other)]
    constants = list(zip(code.co_consts, other.co_consts, strict=False))
    return (
        of_both[0] == of_both[1]
        and len(code.co_consts) == len(other.co_consts)
        and all(
            _is_same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else (type(a), a) == (type(b), b)
            for a, b in constants
        )
    )


def _source(function: FunctionType) -> ast.AST | None:
    """The syntax tree of a function's definition; None unless a readable source compiles to the very code that runs."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    compiled = _compiled("".join(linecache.getlines(code.co_filename, function.__globals__)))
    if compiled is None:
        return None
    tree, module = compiled
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                same_place = (c for c in _codes(module) if (c.co_name, c.co_firstlineno) == (node.name, first))
                return node if any(_is_same(code, c) for c in same_place) else None
    return None


@dataclass(frozen=True)
class Fingerprint:
    """What a callable's code says; the outermost function first, then those that `functools.wraps` put it around."""

    functions: tuple[FunctionType, ...]
    codes: tuple[CodeType, ...]
    digests: tuple[str | None, ...]  # None without a readable source

    def holds(self) -> bool:
        """Whether the same functions still run the same code."""
        return tuple([function.__code__ for function in self.functions]) == self.codes  # identity, before anything else


_FINGERPRINTS: dict[FunctionType, Fingerprint] = {}


def fingerprint(function: Any) -> Fingerprint | None:
    """The fingerprint of a function or method, computed once; None for a callable that is no Python function.

    A call for a function seen before compares code objects only. Whoever gives a function other code (autoreload) is noticed.
    """
    function = getattr(function, "__func__", function)
    if type(function) is not FunctionType:
        return None
    known = _FINGERPRINTS.get(function)
    if known is None or not known.holds():
        functions = tuple(_layers(function))
        sources = [_source(layer) for layer in functions]
        digests = tuple([None if source is None else digest(source) for source in sources])
        known = Fingerprint(functions, tuple([layer.__code__ for layer in functions]), digests)
        _FINGERPRINTS[function] = known
    return known


def _layers(function: Any) -> Iterator[FunctionType]:
    seen: set[int] = set()
    while type(function) is FunctionType and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = function.__dict__.get("__wrapped__")
