"""Read rows from comma-, semicolon- or tab-separated files."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.jsontext import find_repeated
from tunesmith.sources.rowsize import bound_row

_LINE_BREAK = re.compile(r"\r\n|\r|\n")

NumberedRow = tuple[int, Any]


def read_csv(file: DataFile) -> Iterator[NumberedRow]:
    """Every row below the header, numbered by its first line."""
    csv.field_size_limit(1 << 30)
    with file.open_text(newline="") as text:
        lines_above = 0
        first = ""
        for first in text:
            if first.strip("\r\n"):
                break
            lines_above += 1
        delimiter = max("\t" if file.container == ".tsv" else ",", ";", "\t", key=first.count)
        reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
        last_line = lines_above
        header: list[str] = []
        try:
            for fields in reader:
                last_line = lines_above + reader.line_num
                number = last_line - sum(len(_LINE_BREAK.findall(field)) for field in fields)
                if not header:
                    header = check_header(f"{file.path}:{number}", fields)
                elif fields:
                    _check_width(f"{file.path}:{number}", fields, header, delimiter)
                    yield number, bound_row(dict(zip(header, fields, strict=True)), file.max_row_mb)
        except csv.Error as error:
            raise DataError(
                f"{file.path}:{last_line + 1}: broken CSV ({error}). Correct the row that begins there.",
                code="broken-csv",
            ) from None


def check_header(where: str, names: list[str]) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: two columns have the same name, so that a row would keep only one of them.
    """
    repeated = find_repeated(names)
    if repeated is None:
        return names
    places = [str(place) for place, name in enumerate(names, 1) if name == repeated]
    what = f"are named {repeated!r}" if repeated else "have no name"
    raise DataError(
        f"{where}: the columns {' and '.join(places)} {what}. Give each column its own name.", code="duplicate-column"
    )


def _check_width(where: str, fields: list[str], header: list[str], delimiter: str) -> None:
    if len(fields) != len(header):
        raise DataError(
            f"{where}: the row has {len(fields)} fields, the header has {len(header)}. Quote fields that contain "
            f"{delimiter!r}.",
            code="wrong-field-count",
        )
