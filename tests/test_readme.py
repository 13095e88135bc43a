"""Pages in English and Chinese have the same content, and their commands parse."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from tunesmith.config.runfile import leaf_fields
from tunesmith.config.schema import RunConfig
from tunesmith.foreign.console import take_command
from tunesmith.foreign.minimind import convert_command
from tunesmith.parser.build import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (("README.md", "README.zh-CN.md"), ("docs/minimind.md", "docs/minimind.zh-CN.md"))
PAGES = [page for pair in PAIRS for page in pair]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks, without comments."""
    without = ((kind, re.sub(r" *#.*", "", text)) for kind, text in _BLOCK.findall(read(page)))
    return [(kind, text.strip()) for kind, text in without]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_code(english: str, chinese: str) -> None:
    assert len(blocks(english)) >= 5
    assert blocks(english) == blocks(chinese)


@pytest.mark.parametrize("pair", PAIRS)
def test_both_languages_have_the_same_links_and_headings(pair: tuple[str, str]) -> None:
    names = {Path(page).name for page in pair}

    def targets(page: str) -> list[str]:
        """Links; a Chinese page links the Chinese form of a page."""
        found = re.findall(r"\]\(([^)]+)\)", read(page))
        return sorted(
            target.replace(".zh-CN.md", ".md") for target in found if target not in names and "#" not in target
        )

    def levels(page: str) -> list[str]:
        return re.findall(r"^#+(?= )", read(page), re.M)

    assert targets(pair[0]) == targets(pair[1])
    assert levels(pair[0]) == levels(pair[1])
    rows = [[line for line in read(page).splitlines() if line.startswith("| ")] for page in pair]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", read(page)):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
    headings = {
        re.sub(r"\W+", "-", line.strip("# ").lower()) for line in read(page).splitlines() if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", read(page)):
        assert anchor in headings, anchor


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_and_scripts_exist(page: str) -> None:
    for cell in re.findall(r"`((?:tests/|bench/|test_)[\w/.]+)`", read(page)):
        assert any((ROOT / folder / cell).exists() for folder in ("", "tests")), cell


def commands() -> list[str]:
    shells = [text for english, _ in PAIRS for kind, text in blocks(english) if kind == "sh"]
    lines = "\n".join(shells).splitlines()
    return [line for line in lines if line.startswith("tunesmith ")]


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    argv, words = take_command(shlex.split(line)[1:])
    options = build_parser().parse_args(argv)
    assert options.command == argv[0]
    if words is not None:
        assert not convert_command(words, options.generation).problems


@pytest.mark.parametrize("page", PAGES)
def test_named_keys_exist(page: str) -> None:
    known = leaf_fields(RunConfig)
    for key in re.findall(r"`(?:--)?((?:model|data|optim|lora|train)\.[a-z_]+)", read(page)):
        assert key in known, key


def test_python_code_uses_public_names() -> None:
    import tunesmith

    (code,) = (text for kind, text in blocks("README.md") if kind == "python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tunesmith":
            assert node.attr in tunesmith.__all__


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 130
