"""Read rows from one file of any supported format, detected from its name and first bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_arrow, read_parquet
from tunesmith.sources.csvfile import read_csv
from tunesmith.sources.datafile import SUFFIXES, DataFile, Meter, explain_errors
from tunesmith.sources.excel import read_excel
from tunesmith.sources.jsonfile import read_json
from tunesmith.sources.rowsize import DEFAULT_MAX_ROW_MB
from tunesmith.sources.textfile import read_text

NumberedRow = tuple[int, Any]


def read_file(
    path: Path,
    encoding: str = "utf-8",
    max_row_mb: float = DEFAULT_MAX_ROW_MB,
    parses: bool = True,
    meter: Meter | None = None,
) -> Iterator[NumberedRow]:
    """Every row with its number, 1-based: the first line of a JSON Lines or CSV row, else the item.

    The value of a row larger than max_row_mb is a RowTooLarge. A .txt or .md file is one document of any size, whose
    text is a LongText where it is not held in memory.

    Args:
        parses: off: the value of a line of JSON is a JsonLine, to be parsed later.
        meter: told which file is being read.

    Raises:
        DataError: the file is unreadable, empty, broken or of an unknown kind.
    """
    file = DataFile(path, encoding, max_row_mb, meter)
    require_data_file(file)
    number = 0
    with explain_errors(file, lambda: number):
        is_json = file.container in _JSON
        for number, value in read_json(file, parses) if is_json else _READERS[str(file.container)](file):
            yield number, value
    if number == 0:
        raise without_rows(path)


def require_data_file(file: DataFile) -> None:
    """Check what can be said of a file before it is read.

    Raises:
        DataError: it is not a file, of an unknown kind, unreadable or empty.
    """
    path = file.path
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: is a pipe or a device; data is read more than once. Save it to a file first.", code="not-a-file"
        )
    if file.container is None:
        raise DataError(
            f"{path}: unknown file type. Known: {', '.join(SUFFIXES)}, plain or .gz.", code="unknown-file-type"
        )
    with explain_errors(file):
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.", code="file-empty")


def without_rows(path: Path) -> DataError:
    return DataError(f"{path}: the file has no rows. Give a file with data.", code="file-without-rows")


_JSON = (".json", ".jsonl", ".ndjson")
_READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".xlsx": read_excel,
    ".txt": read_text,
    ".md": read_text,
}
