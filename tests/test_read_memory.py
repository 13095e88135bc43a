"""Rows given in Python become a file that reads back to the same rows."""

from __future__ import annotations

import datetime
import decimal
import math
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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


def test_dates_and_decimals_read_as_from_a_parquet_file(tmp_path: Path) -> None:
    """The same rows as a Dataset, as dicts, as an Arrow table and as a Parquet file give the same values."""
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    rows = [
        {"prompt": "a", "at": moment, "on": moment.date(), "t": moment.time(), "price": decimal.Decimal("42.10"),
         "took": datetime.timedelta(seconds=90), "meta": {"at": [moment, None]}},
        {"prompt": "b", "at": None, "on": None, "t": None, "price": None, "took": None, "meta": {"at": []}},
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = [row.value for row in read_rows(sources_of(tmp_path / "rows.parquet", "data"))]
    assert expected[0] == {
        "prompt": "a", "at": "2024-01-02T03:04:05", "on": "2024-01-02", "t": "03:04:05", "price": "42.10",
        "took": "0:01:30", "meta": {"at": ["2024-01-02T03:04:05", None]},
    }  # fmt: skip
    for given in (rows, table, datasets.Dataset(table), pd.DataFrame(rows, dtype=object)):
        assert is_rows(given)
        assert back(given, tmp_path / "rows.jsonl") == expected, type(given)


def test_a_frame_with_two_columns_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_rows("data", pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), tmp_path / "rows.jsonl")
    assert error.value.code == "duplicate-column"


def test_several_splits_are_refused() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])})
    with pytest.raises(DataError) as error:
        is_rows(splits)
    assert error.value.code == "several-splits"


def test_rows_are_named_after_the_argument(tmp_path: Path) -> None:
    write_rows("data", ROWS, tmp_path / "rows.jsonl")
    assert [row.where for row in read_rows(sources_of(tmp_path / "rows.jsonl", "data"))][:2] == ["data[0]", "data[1]"]


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
    assert str(error.value).startswith("data[1]: ")


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
