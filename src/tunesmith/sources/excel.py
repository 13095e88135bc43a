"""Read rows from an Excel workbook; needs the extra `excel` (openpyxl)."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.csvfile import check_header
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.rowsize import bound_row

_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s+ref="([A-Z]+(\d+):[A-Z]+(\d+))"')
_PIECE = 1 << 20

NumberedRow = tuple[int, Any]


def read_excel(file: DataFile) -> Iterator[NumberedRow]:
    """Rows below the header of the only sheet with data, numbered as in Excel.

    Raises:
        DataError: openpyxl is not installed, the file is not a workbook, several sheets have data, or a formula has no
            computed value.
    """
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise DataError(
            f"{file.path}: Excel files need openpyxl, which is not installed: pip install 'tunesmith[excel]'. Or save "
            "the sheet as CSV.",
            code="openpyxl-missing",
        ) from None
    if file.is_gzip:
        raise DataError(
            f"{file.path}: is a gzipped workbook. Excel files are compressed already; unpack it with gunzip.",
            code="gzip-unsupported",
        )
    try:
        with contextlib.closing(_open(file, True)) as values, contextlib.closing(_open(file, False)) as formulas:
            title = _only_sheet(file, formulas)
            _refuse_merged_rows(file, formulas[title])
            yield from _read_sheet(file, values[title], formulas[title])
    except (DataError, OSError, MemoryError):
        raise
    except Exception as error:  # openpyxl passes on any exception of its parsers
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{file.path}: is not a readable Excel workbook ({first[:200]}). Open it in Excel or LibreOffice and "
            "save it again.",
            code="file-damaged",
        ) from None


def _open(file: DataFile, data_only: bool) -> Any:
    """The workbook with computed values (data_only), or with the formulas."""
    import openpyxl

    with warnings.catch_warnings(action="ignore"):  # they concern styles and extensions, not data
        return openpyxl.load_workbook(file.path, read_only=True, data_only=data_only)


def _only_sheet(file: DataFile, book: Any) -> str:
    filled = [sheet.title for sheet in book.worksheets if any(map(_is_filled, sheet.iter_rows()))]
    if len(filled) > 1:
        raise DataError(
            f"{file.path}: several sheets have data ({', '.join(filled)}). Save the one to train on as a CSV file.",
            code="several-sheets",
        )
    if not filled:
        raise DataError(f"{file.path}: the file has no rows. Give a file with data.", code="file-without-rows")
    return str(filled[0])


def _refuse_merged_rows(file: DataFile, sheet: Any) -> None:
    """Refuse cells merged over several rows: only the first row has their text, the other rows would lack it."""
    with zipfile.ZipFile(file.path) as book, book.open(sheet._worksheet_path) as opened:
        before = b""
        while piece := opened.read(_PIECE):
            for found in _MERGED.finditer(before + piece):
                if found[2] != found[3]:
                    cells = found[1].decode("ascii")
                    raise DataError(
                        f"{file.path}: the cells {cells} are merged over rows; only the first row has the text. "
                        "Unmerge them and write the text into each row.",
                        code="merged-cells",
                    )
            before = piece[-100:]


def _is_filled(cells: Sequence[Any]) -> bool:
    return any(cell.value not in (None, "") for cell in cells)


def _read_sheet(file: DataFile, values: Any, formulas: Any) -> Iterator[NumberedRow]:
    header: list[str] = []
    for number, (cells, sources) in enumerate(zip(values.iter_rows(), formulas.iter_rows(), strict=True), 1):
        if not _is_filled(sources):
            continue
        where = f"{file.path}:{number}"
        texts = [_plain(where, cell, source) for cell, source in zip(cells, sources, strict=True)]
        if header:
            if any(text not in (None, "") for text in texts[len(header) :]):
                raise DataError(
                    f"{where}: a cell is beyond the last column of the header. Name its column, or remove the rows "
                    "above the header.",
                    code="cell-beyond-header",
                )
            yield number, bound_row(dict(itertools.zip_longest(header, texts[: len(header)])), file.max_row_mb)
        else:
            while texts[-1] in (None, ""):
                texts.pop()
            header = check_header(where, ["" if text is None else str(text) for text in texts])


def _plain(where: str, cell: Any, source: Any) -> Any:
    """The value as in JSON; dates are ISO text."""
    value = cell.value
    if source.data_type == "f" and value is None:
        raise DataError(
            f"{where}: cell {source.coordinate} has a formula without a computed value. Open the workbook in Excel or "
            "LibreOffice and save it, or save the sheet as CSV.",
            code="formula-not-computed",
        )
    if cell.data_type == "e":
        raise DataError(
            f"{where}: cell {cell.coordinate} has the error {value}. Correct or empty the cell.", code="cell-error"
        )
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else value
