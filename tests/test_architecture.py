"""Imports go one way, packages, files and functions stay short, and the public names exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
# A module imports from its own package and from those before it.
ORDER = [
    "errors", "importing", "reading", "display", "streams", "terminal", "runfolder", "files", "config", "tensors", "staging", "minimind", "sources", "foreign", "rows",
    "chat_template", "tokens", "encode", "plans", "data", "preparation", "streaming", "layers", "older_keys", "adapters", "attention", "model", "cards", "hashes", "caches", "generation", "gguf", "distributed", "monitor", "training", "run", "lr_find", "use", "exports", "report", "stages", "evaluation", "distillation", "judging", "publish", "serve", "arguments", "process", "models", "api", "demo", "parser", "boundary", "cli",
    "__main__",
]  # fmt: skip
MAX_FILES, MAX_SHARE = 15, 0.15  # of a package: files, and its part of all lines
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """data/store.py -> "data.store"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    package = name_of(path).split(".")[0]
    if package == "__init__":
        return
    for module in imports_of(path):
        if module.startswith("tunesmith.") and (top := module.split(".")[1]) in ORDER:
            assert ORDER.index(top) <= ORDER.index(package), f"{path} imports {module}"


def test_every_package_is_in_the_order() -> None:
    assert {name_of(path).split(".")[0] for path in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("package", [name for name in ORDER if (PACKAGE / name).is_dir()])
def test_modules_of_a_package_have_an_order(package: str) -> None:
    """No cycle inside a package: its modules can be read one after another."""
    waiting = {name_of(path): imports_of(path) for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__"}
    while waiting:
        ready = [name for name, found in waiting.items() if not {f"tunesmith.{other}" for other in waiting} & found]
        assert ready, f"import cycle among {sorted(waiting)}"
        for name in ready:
            del waiting[name]


def test_packages_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    for package in ORDER:
        own = [path for path in FILES if path.is_relative_to(PACKAGE / package) and path.stem != "__init__"]
        assert len(own) <= MAX_FILES, f"{package} has {len(own)} files"
        assert sum(lines[path] for path in own) <= MAX_SHARE * sum(lines.values()), package


@pytest.mark.parametrize(
    "package",
    ["sources", "foreign", "rows", "chat_template", "tokens", "encode", "plans", "data", "preparation", "streaming"],
)
def test_data_knows_neither_torch_nor_transformers(package: str) -> None:
    for path in (PACKAGE / package).glob("*.py"):
        heavy = [m for m in imports_of(path) if m.split(".")[0] in ("torch", "transformers")]
        assert not heavy, f"{path} imports {heavy}"


def test_use_and_training_know_nothing_of_each_other() -> None:
    for package, others in (("use", (["training"], ["run"])), ("training", (["use"], ["run"])), ("run", (["use"],))):
        for path in (PACKAGE / package).glob("*.py"):
            wrong = [m for m in imports_of(path) if m.split(".")[:1] == ["tunesmith"] and m.split(".")[1:2] in others]
            assert not wrong, f"{path} imports {wrong}"


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
