"""The house keeps its shape: who may import whom, how long things are, what the public names are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
# a room may import the rooms before it, and itself
ORDER = [
    "errors",
    "reading",
    "display",
    "plainyaml",
    "files",
    "config",
    "foreign",
    "runfile",
    "data",
    "model",
    "train",
    "use",
    "demo",
    "parser",
    "streams",
    "boundary",
    "cli",
    "__main__",
]
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_imports_upwards(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    if room == "__init__":
        return
    for module in imports_of(path):
        if module.startswith("tunesmith."):
            assert ORDER.index(room_of(module)) <= ORDER.index(room), f"{path} imports {module}"


@pytest.mark.parametrize("room", ["data"])
def test_data_knows_neither_torch_nor_transformers(room: str) -> None:
    for path in (PACKAGE / room).glob("*.py"):
        heavy = [m for m in imports_of(path) if m.split(".")[0] in ("torch", "transformers")]
        assert not heavy, f"{path} imports {heavy}"


def test_init_files_re_export_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text(encoding="utf-8").strip() == "", path


def test_files_and_functions_stay_readable() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, f"{path} is too long for one idea"
        assert path.name not in ("utils.py", "helpers.py", "misc.py"), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_public_names_exist() -> None:
    for name in tunesmith.__all__:
        assert hasattr(tunesmith, name)
