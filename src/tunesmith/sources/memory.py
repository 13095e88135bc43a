"""Write rows given in Python to a JSON Lines file, to be hashed, named and resumed like rows of any file."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_batches
from tunesmith.sources.jsontext import find_repeated
from tunesmith.sources.names import name_nth
from tunesmith.sources.read import Sources

_MAX_DEPTH = 200


def is_rows(data: Any) -> bool:
    """Whether a data argument holds rows (a `datasets` data set, or an iterable of dicts) rather than file names.

    Iterators are not inspected, since that would consume their first row.

    Raises:
        DataError: it is a DatasetDict, which has several splits.
    """
    if type(data).__name__ in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(str, data))
        raise DataError(
            f"data: is a DatasetDict with the splits {splits}. Give one of them: data=splits['train'], and "
            "eval_data=splits['test'] to evaluate on another.",
            code="several-splits",
        )
    if isinstance(data, (str, bytes, os.PathLike, Mapping)) or data is None:
        return False
    if _is_frame(data) or hasattr(data, "__arrow_c_stream__"):
        return True
    if isinstance(data, (list, tuple)):
        return not (data and all(isinstance(item, (str, os.PathLike)) for item in data))
    return isinstance(data, Iterable)


def write_rows(name: str, rows: Iterable[Any], path: Path) -> None:
    """Write one JSON object per line.

    Args:
        name: the argument that the rows were given as, for errors.

    Raises:
        DataError: there are no rows, or a row has a value that JSON cannot represent.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(_iterate(name, rows), 1):
            file.write(_to_line(name_nth(name, count), row))
    if not count:
        raise DataError(f"{name}: holds no rows. Give a list of dicts, a data set, or file names.", code="no-rows")


def sources_of(path: Path, shown: str) -> Sources:
    """The sources of a file made by `write_rows`; its rows are named SHOWN:NUMBER, or data[INDEX]."""
    return Sources(files=[path], names={path: shown})


def _is_frame(data: Any) -> bool:
    return hasattr(data, "to_dict") and hasattr(data, "columns")


def _iterate(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Rows of a list or iterator of dicts, a `datasets` data set, a DataFrame or an Arrow table."""
    if _is_frame(rows) and hasattr(rows, "iterrows"):  # pandas, whose cells may be any Python value
        frame: Any = rows
        repeated = find_repeated([str(column) for column in frame.columns])
        if repeated is not None:
            raise DataError(
                f"{name}: two columns are named {repeated!r}. Give each column its own name.", code="duplicate-column"
            )
        return iter(frame.to_dict("records"))
    if hasattr(rows, "__arrow_c_stream__") and not hasattr(rows, "features"):  # pyarrow, polars, duckdb
        import pyarrow as pa

        return (row for _, row in read_batches(name, pa.table(rows).to_batches(), math.inf))
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
    """The value as JSON represents it. NaN (a missing value in pandas) becomes null, dates become ISO text."""
    if type(value).__module__.split(".")[0] == "numpy":  # as in pandas records
        value = value.tolist()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, (bool, int, str)):
        return str(value) if isinstance(value, enum.Enum) else value
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, decimal.Decimal, uuid.UUID)):
        return str(value)
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
        f"{where}: holds {what}, which JSON cannot represent. Use str, int, float, bool, None, "
        "list and dict, or remove the column.",
        code="row-not-json",
    )
