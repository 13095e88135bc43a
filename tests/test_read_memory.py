"""Rows given in Python become a file that reads back to the same rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from tunesmith.errors import DataError
from tunesmith.sources.memory import is_rows, sources_of, write_rows
from tunesmith.sources.read import read_rows


def back(rows: Any, path: Path) -> list[Any]:
    write_rows("data", rows, path)
    return [row.value for row in read_rows(sources_of(path, "data"))]


ROWS = [
    {"messages": [{"role": "user", "content": "a\n\u2028 é 你好 😀"}, {"role": "assistant", "content": ""}]},
    {"a": 1, "b": 1.5, "c": None, "d": [True, {"e": "\x00"}], "f": 10**30, "g": 1e-7},
    {"half": "\ud800"},
    [{"role": "user", "content": "hi"}],
]


def test_rows_read_back_as_they_were(tmp_path: Path) -> None:
    assert back(ROWS, tmp_path / "rows.jsonl") == ROWS
    assert back((row for row in ROWS), tmp_path / "again.jsonl") == ROWS
    assert back([ROWS[1]], tmp_path / "one.jsonl") == [ROWS[1]]


def test_a_data_set_loses_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "b", "name": "c"}]},
    ]
    assert back(datasets.Dataset.from_list(rows), tmp_path / "rows.jsonl") == rows


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    assert back([{"a": math.nan}], tmp_path / "rows.jsonl") == [{"a": None}]


def test_rows_are_named_after_the_argument(tmp_path: Path) -> None:
    write_rows("data", ROWS, tmp_path / "rows.jsonl")
    assert [row.where for row in read_rows(sources_of(tmp_path / "rows.jsonl", "data"))][:2] == ["data:1", "data:2"]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (object(), "row-not-json"), (b"a", "row-not-json"), ({1: 2}, "row-not-json"), (math.inf, "row-not-json"),
        ({1, 2}, "row-not-json"),
    ],
)  # fmt: skip
def test_what_json_has_not_is_refused_with_its_row(tmp_path: Path, value: Any, code: str) -> None:
    with pytest.raises(DataError) as error:
        write_rows("data", [{"a": 1}, {"a": [value]}], tmp_path / "rows.jsonl")
    assert error.value.code == code
    assert "data, row 2" in str(error.value)


def test_a_row_that_holds_itself_is_refused(tmp_path: Path) -> None:
    row: dict[str, Any] = {}
    row["a"] = row
    with pytest.raises(DataError):
        write_rows("data", [row], tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("rows", "code"), [([], "no-rows"), ([1], "row-no-dict"), (["a", {}], "row-no-dict")])
def test_no_rows(tmp_path: Path, rows: Any, code: str) -> None:
    with pytest.raises(DataError) as error:
        write_rows("data", rows, tmp_path / "rows.jsonl")
    assert error.value.code == code


def test_names_are_told_from_rows() -> None:
    assert not any(is_rows(data) for data in ("a.jsonl", Path("a"), ["a", Path("b")], None, {"train": "a"}))
    assert all(is_rows(data) for data in ([], [{}], [{}, "a"], iter([{}]), datasets.Dataset.from_list([{"a": 1}])))
