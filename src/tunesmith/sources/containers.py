"""Read rows from one file of any supported format, detected from its name and first bytes."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_arrow, read_parquet
from tunesmith.sources.csvfile import read_csv
from tunesmith.sources.datafile import SUFFIXES, DataFile, explain_undecodable
from tunesmith.sources.excel import read_excel
from tunesmith.sources.jsonfile import read_json
from tunesmith.sources.rowsize import DEFAULT_MAX_ROW_MB

NumberedRow = tuple[int, Any]


def read_file(path: Path, encoding: str = "utf-8", max_row_mb: float = DEFAULT_MAX_ROW_MB) -> Iterator[NumberedRow]:
    """Every row with its number, 1-based: the first line of a JSON Lines or CSV row, else the item.

    The value of a row larger than max_row_mb is a RowTooLarge; a .txt or .md file is one document of any size.

    Raises:
        DataError: the file is unreadable, empty, broken or of an unknown kind.
    """
    file = DataFile(path, encoding, max_row_mb)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: is a pipe or a device; data is read more than once. Save it to a file first.", code="not-a-file"
        )
    if file.container is None:
        raise DataError(
            f"{path}: unknown file type. Known: {', '.join(SUFFIXES)}, plain or .gz.", code="unknown-file-type"
        )
    number = 0
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.", code="file-empty")
        for number, value in _READERS[file.container](file):
            yield number, value
    except UnicodeError as error:
        raise explain_undecodable(file, error) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"{path}: unreadable{place} (damaged gzip: {error}). Download or copy the file again.", code="file-damaged"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. Check the file's permissions.", code="file-unreadable"
        ) from None
    except MemoryError:
        raise DataError(
            f"{path}: does not fit into memory. Split the file or save it as JSON Lines.", code="out-of-memory"
        ) from None
    if number == 0:
        raise DataError(f"{path}: the file has no rows. Give a file with data.", code="file-without-rows")


def _read_text(file: DataFile) -> Iterator[NumberedRow]:
    """A text file is one document; it is later split into samples of max_seq_len tokens."""
    with file.open_text(newline="") as text:
        yield 1, {"text": text.read()}


_READERS = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".xlsx": read_excel,
    ".txt": _read_text,
    ".md": _read_text,
}
