"""The tables of docs/errors.md: every error with its code, class, exit code and message, read from the source.

Usage: errors.py writes the page (as `make docs` does).
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "tunesmith"
ROOTS = {"TunesmithError": 1, "RowRefused": None}
"""Base classes of our errors, with their exit codes; a refused row goes into the ledger and ends no command."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A place in the source that creates an error.

    Attributes:
        where: file relative to the package, and line.
        kind: class of the error.
        code: its literal code; "" if it has none; None if it passes on the code of another error.
        message: its text, with {name} for values filled in.
    """

    where: str
    kind: str
    code: str | None
    message: str

    @property
    def package(self) -> str:
        return self.where.partition("/")[0].partition(".py")[0]


@functools.cache
def parse_sources() -> dict[str, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def find_classes(sources: Iterable[ast.Module]) -> dict[str, int | None]:
    """Names of our error classes -> exit code, subclasses included."""
    found = dict(ROOTS)
    classes = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        new = [
            (node, base.id)
            for node in classes
            for base in node.bases
            if isinstance(base, ast.Name) and base.id in found and node.name not in found
        ]
        if not new:
            return found
        for node, base in new:
            found[node.name] = _own_exit_code(node) or found[base]


def _own_exit_code(node: ast.ClassDef) -> int | None:
    for line in node.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "exit_code":
            return int(ast.literal_eval(line.value))
    return None


@functools.cache
def find_constants() -> dict[str, str]:
    """Names in upper case that modules assign a text, with the text; without names assigned different texts."""
    found: dict[str, set[str]] = {}
    for tree in parse_sources().values():
        for node in tree.body:
            if not isinstance(node, ast.Assign):
                continue
            pairs = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            for target, value in pairs:
                is_text = isinstance(value, (ast.Constant, ast.JoinedStr))
                if is_text and isinstance(target, ast.Name) and target.id.isupper():
                    found.setdefault(target.id, set()).add(describe(value, tree))
    return {name: next(iter(texts)) for name, texts in found.items() if len(texts) == 1}


@functools.cache
def find_raised() -> list[Raised]:
    """Every call of an error class in the package, and of its constructor in a subclass."""
    sources = parse_sources()
    classes = find_classes(sources.values())
    with_code = classes_with_code(sources.values(), classes)
    raised = [one for name, tree in sources.items() for one in find_in(name, tree, classes)]
    return [one for one in raised if one.kind not in with_code or one.code]


def classes_with_code(sources: Iterable[ast.Module], classes: dict[str, int | None]) -> set[str]:
    """Subclasses whose own constructor gives the code, so that calls of them need none."""
    nodes = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        node.name
        for node in nodes
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        if node.name in classes and "code" not in [argument.arg for argument in method.args.kwonlyargs]
    }


def find_in(name: str, tree: ast.Module, classes: dict[str, int | None]) -> Iterator[Raised]:
    for scope in _functions_of(tree):
        for node in _walk_own(scope):
            if isinstance(node, ast.Call) and (kind := _error_class(node, scope, classes)):
                yield Raised(f"{name}:{node.lineno}", kind, _code_of(node, kind), _message_of(node, scope))


def _functions_of(tree: ast.Module) -> Iterator[ast.AST]:
    """The module, its classes and functions."""
    yield tree
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                node.parent = parent  # type: ignore[attr-defined]
                yield node


def _walk_own(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    stack = list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop(0)
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            stack = list(ast.iter_child_nodes(node)) + stack


def _error_class(call: ast.Call, scope: ast.AST, classes: dict[str, int | None]) -> str:
    if isinstance(call.func, ast.Name) and call.func.id in classes:
        owner = getattr(scope, "parent", None)
        has_own_text = isinstance(owner, ast.ClassDef) and owner.name == call.func.id
        return "" if has_own_text else call.func.id
    owner = getattr(scope, "parent", None)
    is_constructor = ast.unparse(call.func) == "super().__init__" and isinstance(owner, ast.ClassDef)
    if is_constructor and owner.name in classes and owner.name not in (*ROOTS, "ConfigError"):
        return str(owner.name)
    return ""


def _code_of(call: ast.Call, kind: str) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == "code":
            if isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value)
            return None if isinstance(keyword.value, ast.Attribute) and keyword.value.attr == "code" else ""
    return "config" if kind == "ConfigError" else ""


def _message_of(call: ast.Call, scope: ast.AST) -> str:
    if not call.args:
        return ""
    text = ": ".join(describe(argument, scope) for argument in call.args[:2] if not isinstance(argument, ast.Constant)
                     or isinstance(argument.value, str))  # fmt: skip
    return " ".join(text.split())


def describe(node: ast.AST, scope: ast.AST | None = None) -> str:
    """The text of an expression, with {name} for values that are not in the source."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(describe(part, scope) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return describe(node.value, scope)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return describe(node.left, scope) + describe(node.right, scope)
    if isinstance(node, ast.IfExp):
        return "|".join(dict.fromkeys([describe(node.body, scope), describe(node.orelse, scope)])).strip("|")
    if isinstance(node, (ast.List, ast.Tuple)):
        return " ".join(describe(item, scope) for item in node.elts)
    if isinstance(node, ast.Name) and scope is not None and (text := _assigned_text(node.id, scope)):
        return text
    if isinstance(node, ast.Name) and node.id.isupper() and not isinstance(scope, ast.Module):
        return find_constants().get(node.id, f"{{{node.id}}}")
    return f"{{{name_value(node)}}}"


def _assigned_text(name: str, scope: ast.AST) -> str:
    """The only text that a function assigns to a name; "" if there are several or none."""
    values = [
        node.value
        for node in _walk_own(scope)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]
    is_text = len(values) == 1 and isinstance(values[0], (ast.JoinedStr, ast.Constant))
    return describe(values[0], None) if is_text else ""


def name_value(node: ast.AST) -> str:
    """A short name for a value: the last telling name in its expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return name_value(node.value) if node.attr in ("__name__", "name", "value") else node.attr
    if isinstance(node, ast.Call):
        return name_value(node.args[0]) if node.args else name_value(node.func)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return name_value(node.generators[0].iter)
    if isinstance(node, (ast.Subscript, ast.Starred, ast.FormattedValue)):
        return name_value(node.value)
    if isinstance(node, ast.BoolOp):
        return name_value(node.values[0])
    if isinstance(node, ast.BinOp):
        return name_value(node.left)
    return "..."


def error_table(kinds: Iterable[str]) -> str:
    """Codes of these classes with their messages."""
    rows: dict[tuple[str, str], list[str]] = {}
    for raised in find_raised():
        if raised.kind in kinds and raised.code:
            rows.setdefault((raised.code, raised.kind), []).append(raised.message)
    lines = ["| code | class | message |", "| --- | --- | --- |"]
    for (code, kind), messages in sorted(rows.items()):
        shown = "<br>".join(_cell(message) for message in sorted(set(messages)))
        lines.append(f"| `{code}` | {kind} | {shown} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(mark, shown)
    return text.replace("_", "\\_")


def class_table() -> str:
    lines = ["| class | exit code |", "| --- | --- |"]
    classes = find_classes(parse_sources().values())
    return "\n".join(lines + [f"| {name} | {code} |" for name, code in classes.items() if code is not None])


def command_errors() -> str:
    return error_table([name for name, code in find_classes(parse_sources().values()).items() if code is not None])


def row_errors() -> str:
    return error_table([name for name, code in find_classes(parse_sources().values()).items() if code is None])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
    else:
        import generate

        page = "docs/errors.md"
        (ROOT / page).write_text(generate.fill_page(page), encoding="utf-8")
