"""Excel workbooks: one sheet, a header row, values as displayed; anything ambiguous is an error."""

from __future__ import annotations

import datetime
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from conftest import raises
from tunesmith.errors import DataError
from tunesmith.sources.read import RawRow, find_sources, read_rows


def book(path: Path, *rows: list[Any], **sheets: list[list[Any]]) -> Path:
    workbook = openpyxl.Workbook()
    for row in rows:
        workbook.active.append(row)
    for title, more in sheets.items():
        sheet = workbook.create_sheet(title)
        for row in more:
            sheet.append(row)
    workbook.save(path)
    return path


def read(path: Path) -> list[RawRow]:
    return list(read_rows(find_sources([str(path)])))


def test_a_sheet_is_its_rows(tmp_path: Path) -> None:
    day, moment = datetime.date(2024, 5, 1), datetime.datetime(2024, 5, 1, 12, 30)
    path = book(
        tmp_path / "x.xlsx",
        [],
        ["prompt", "completion", "n", "when", None],
        ["你好\n世界", "a", 3, day],
        [],
        ["q", None, 2.5, moment],
        ["only", None],
        [True, "b", 10**12, datetime.time(8, 15)],
        empty=[],
    )
    rows = read(path)
    assert [row.number for row in rows] == [3, 5, 6, 7]
    assert [row.value for row in rows] == [
        {"prompt": "你好\n世界", "completion": "a", "n": 3, "when": "2024-05-01"},
        {"prompt": "q", "completion": None, "n": 2.5, "when": "2024-05-01T12:30:00"},
        {"prompt": "only", "completion": None, "n": None, "when": None},
        {"prompt": True, "completion": "b", "n": 10**12, "when": "08:15:00"},
    ]
    assert type(rows[0].value["n"]) is int
    assert find_sources([str(tmp_path)]).files == [path]


@pytest.mark.parametrize(
    ("rows", "sheets", "code", "facts"),
    [
        ([["a", "b", "a"], [1, 2, 3]], {}, "duplicate-column", ("x.xlsx:1:", "1 and 3", "'a'")),
        ([["a", None, None, "b"], [1, 2, 3, 4]], {}, "duplicate-column", ("x.xlsx:1:", "2 and 3")),
        ([["a"], [1, 2]], {}, "cell-beyond-header", ("x.xlsx:2:",)),
        ([["a"], [1]], {"More": [["a"], [2]]}, "several-sheets", ("Sheet, More",)),
        ([["a", "b"], [1, "=A2+1"]], {}, "formula-not-computed", ("x.xlsx:2:", "B2")),
        ([["a"], ["#DIV/0!"]], {}, "cell-error", ("x.xlsx:2:", "A2", "#DIV/0!")),
        ([], {}, "file-without-rows", ("x.xlsx",)),
        ([["a"]], {}, "file-without-rows", ("x.xlsx",)),
    ],
)
def test_what_is_ambiguous_is_an_error(
    tmp_path: Path, rows: list[Any], sheets: dict[str, Any], code: str, facts: tuple[str, ...]
) -> None:
    path = book(tmp_path / "x.xlsx", *rows, **sheets)
    with raises(DataError, code, *facts):
        read(path)


def test_a_computed_formula_is_its_value(tmp_path: Path) -> None:
    path = book(tmp_path / "x.xlsx", ["a", "b"], [1, "=A2+1"])
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            content = (
                old.read(name)
                .replace(b"<f>A2+1</f><v></v>", b"<f>A2+1</f><v>2</v>")
                .replace(b"<f>A2+1</f><v />", b"<f>A2+1</f><v>2</v>")
            )
            new.writestr(name, content)
    path.write_bytes(packed.getvalue())
    assert read(path)[0].value == {"a": 1, "b": 2}


def test_files_that_are_no_workbooks(tmp_path: Path) -> None:
    for content in (b"PK", b"PK\x03\x04" + b"\0" * 99, b"<html>"):
        (tmp_path / "x.xlsx").write_bytes(content)
        with raises(DataError, "file-damaged", "x.xlsx"):
            read(tmp_path / "x.xlsx")


def test_without_the_extra_an_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = book(tmp_path / "x.xlsx", ["a"], [1])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with raises(DataError, "openpyxl-missing", "pip install 'tunesmith[excel]'"):
        read(path)


@pytest.mark.parametrize(("cells", "is_refused"), [("A2:A3", True), ("A2:B3", True), ("A2:B2", False)])
def test_cells_merged_over_rows_are_refused(tmp_path: Path, cells: str, is_refused: bool) -> None:
    """Excel keeps the text in the first row only, so the others would lose their question."""
    path = book(tmp_path / "x.xlsx", ["instruction", "output"], ["Q", "A"], [None, "B"])
    workbook = openpyxl.load_workbook(path)
    workbook.active.merge_cells(cells)
    workbook.save(path)
    if is_refused:
        with raises(DataError, "merged-cells", cells):
            read(path)
    else:
        assert len(read(path)) == 2
