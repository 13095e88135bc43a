"""The generated parts of docs/architecture.md: the file map and the picture of the imports.

Usage: architecture.py prints each package's share of all lines; `make docs` writes the page.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "tunesmith"


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = " ".join(doc.split("\n\n")[0].split())
    return line.partition(". ")[0].removesuffix(".")


def count_lines(package: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files_of(package))


def files_of(package: str) -> list[Path]:
    folder = PACKAGE / package
    found = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{package}.py"]
    return sorted(path for path in found if path.stem != "__init__")


def imports() -> dict[str, set[str]]:
    """Package or top-level module -> our packages and modules that it imports."""
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in names if files_of(name)}
    for name, below in found.items():
        for path in files_of(name):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunesmith."):
                    below.add((node.module or "").split(".")[1])
        below &= set(found) - {name}
    return found


def in_layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """Names in reading order: each after everything that it imports."""
    layers: list[list[str]] = []
    waiting = dict(graph)
    while waiting:
        layer = sorted(name for name, below in waiting.items() if not below & set(waiting))
        if not layer:
            raise SystemExit(f"import cycle among {', '.join(sorted(waiting))}")
        layers.append(layer)
        for name in layer:
            del waiting[name]
    return layers


def import_picture() -> str:
    """A Mermaid graph of the packages; arrows implied by two others are omitted."""
    graph = imports()
    packages = [name for layer in in_layers(graph) for name in layer if (PACKAGE / name).is_dir()]
    lines = ["```mermaid", "flowchart BT"]
    for name in packages:
        lines.append(f"  {name}")
        direct = {below for below in graph[name] if below in packages}
        implied = {far for below in direct for far in reachable(graph, below)}
        lines += [f"  {name} --> {below}" for below in sorted(direct - implied)]
    return "\n".join([*lines, "```"])


def reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    found: set[str] = set()
    stack = list(graph[name])
    while stack:
        if (one := stack.pop()) not in found:
            found.add(one)
            stack += graph[one]
    return found


def file_map() -> str:
    """Every source file with its purpose, packages in import order."""
    graph = imports()
    order = [name for layer in in_layers(graph) for name in layer]
    lines = ["```"]
    for name in order:
        if (PACKAGE / name).is_dir():
            lines.append(f"{name}/")
            lines += [f"  {path.name:<22}{first_line(path)}" for path in files_of(name)]
        else:
            lines.append(f"{name + '.py':<24}{first_line(PACKAGE / f'{name}.py')}")
    return "\n".join([*lines, "```"])


def shares() -> str:
    """Lines of each package, and its share of all lines."""
    lines = {name: count_lines(name) for name in imports()}
    total = sum(lines.values())
    table = [f"{name:<16}{count:>6}{count / total:>8.1%}" for name, count in sorted(lines.items(), key=lambda x: -x[1])]
    return "\n".join([*table, f"{'all':<16}{total:>6}"])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(shares())
