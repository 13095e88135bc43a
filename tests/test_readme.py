"""README.md and README.zh-CN.md have the same content, and their commands parse."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from tunesmith.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks, without comments."""
    without = ((kind, re.sub(r" *#.*", "", text)) for kind, text in _BLOCK.findall(read(page)))
    return [(kind, text.strip()) for kind, text in without]


def test_both_languages_have_the_same_code() -> None:
    english, chinese = map(blocks, PAGES)
    assert len(english) >= 5
    assert english == chinese


def test_both_languages_have_the_same_links_and_headings() -> None:
    def targets(page: str) -> list[str]:
        found = re.findall(r"\]\(([^)]+)\)", read(page))
        return sorted(target for target in found if not target.startswith("README"))

    def levels(page: str) -> list[str]:
        return re.findall(r"^#+(?= )", read(page), re.M)

    assert targets(PAGES[0]) == targets(PAGES[1])
    assert levels(PAGES[0]) == levels(PAGES[1])
    rows = [[line for line in read(page).splitlines() if line.startswith("| ")] for page in PAGES]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", read(page)):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_and_scripts_exist(page: str) -> None:
    for cell in re.findall(r"`((?:tests/|bench/|test_)[\w/.]+)`", read(page)):
        assert any((ROOT / folder / cell).exists() for folder in ("", "tests")), cell


def commands() -> list[str]:
    lines = "\n".join(text for kind, text in blocks("README.md") if kind == "sh").splitlines()
    return [line for line in lines if line.startswith("tunesmith ")]


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    options = build_parser().parse_args(shlex.split(line)[1:])
    assert options.command == shlex.split(line)[1]


def test_python_code_uses_public_names() -> None:
    import tunesmith

    (code,) = (text for kind, text in blocks("README.md") if kind == "python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tunesmith":
            assert node.attr in tunesmith.__all__


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 120
