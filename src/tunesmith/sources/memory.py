"""Rows given in Python, written to a JSON Lines file: hashed, named and resumed as rows of any file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_batches
from tunesmith.sources.read import Sources

_MAX_DEPTH = 200


def is_rows(data: Any) -> bool:
    """Whether a data argument holds rows: a `datasets` data set, or an iterable that begins with no name of a file.

    An iterator is not looked into: its rows would be gone.

    Raises:
        DataError: it is a pandas DataFrame, whose items are the names of its columns.
    """
    if isinstance(data, (str, bytes, os.PathLike, Mapping)) or data is None:
        return False
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise DataError("data: is a DataFrame. Give its rows: data.to_dict('records').", code="data-frame")
    if isinstance(data, (list, tuple)):
        return not (data and all(isinstance(item, (str, os.PathLike)) for item in data))
    return isinstance(data, Iterable)


def write_rows(name: str, rows: Iterable[Any], path: Path) -> None:
    """Write one JSON object a line.

    Args:
        name: the argument that the rows were given as, for errors.

    Raises:
        DataError: there are no rows, or one has a value that JSON does not have.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(_iterate(name, rows), 1):
            file.write(_to_line(f"{name}, row {count}", row))
    if not count:
        raise DataError(f"{name}: holds no rows. Give a list of dicts, a data set, or names of files.", code="no-rows")


def sources_of(path: Path, shown: str) -> Sources:
    """The sources of a file made by `write_rows`; its rows are named SHOWN:NUMBER."""
    return Sources(files=[path], names={path: shown})


def _iterate(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    batches = getattr(rows, "with_format", None)
    if batches is not None and hasattr(rows, "features") and hasattr(rows, "num_rows"):  # a datasets.Dataset
        arrow: Any = batches("arrow")
        return (row for _, row in read_batches(name, arrow.iter(batch_size=1024), math.inf))
    return iter(rows)


def _to_line(where: str, row: Any) -> str:
    if not isinstance(row, (Mapping, list, tuple)):
        raise DataError(f"{where}: is a {type(row).__name__}, not a dict. Give each row as a dict.", code="row-no-dict")
    try:
        line = json.dumps(_plain(where, row), ensure_ascii=False)
    except ValueError as error:  # an integer of many thousand digits
        raise DataError(f"{where}: {error}.", code="row-not-json") from None
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can hold
        line = json.dumps(_plain(where, row))
    return f"{line}\n"


def _plain(where: str, value: Any, depth: int = 0) -> Any:
    """The value as JSON has it; NaN, which pandas writes for a missing value, becomes null."""
    if type(value).__module__.split(".")[0] == "numpy":  # what pandas puts into records
        value = value.tolist()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not math.isinf(value):
        return None if math.isnan(value) else value
    if depth < _MAX_DEPTH and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(where, below, depth + 1) for key, below in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_plain(where, below, depth + 1) for below in value]
    what = f"a value of type {type(value).__name__}"
    if isinstance(value, float):
        what = "an infinite number"
    elif depth >= _MAX_DEPTH:
        what = "values nested too deep"
    elif isinstance(value, Mapping):
        what = "a dict with a key that is not text"
    raise DataError(
        f"{where}: holds {what}, which JSON does not have. Use str, int, float, bool, None, list and dict.",
        code="row-not-json",
    )
