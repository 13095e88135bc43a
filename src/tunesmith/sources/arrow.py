"""Read rows from Arrow tables (Parquet, save_to_disk, hub data sets).

Arrow gives all structs of a column the same keys; a key that a row did not have becomes null. Below the top-level
columns such nulls are removed. A null in an Arrow map or in JSON text was in the data and stays. Values that JSON does
not have become text: dates in ISO form, decimals as written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.jsontext import DuplicateKey, find_repeated, load_json
from tunesmith.sources.names import name_nth
from tunesmith.sources.rowsize import BYTES_PER_MB, bound_row

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 256

NumberedRow = tuple[int, Any]
_Clean = Callable[[Any], Any]


def read_parquet(file: DataFile, first: int = 0) -> Iterator[NumberedRow]:
    """Rows of a Parquet file.

    Args:
        first: rows to leave out at the beginning; whole row groups of them are not read.
    """
    import pyarrow.parquet as pq  # slow to import, rarely needed

    if file.is_gzip:
        raise DataError(
            f"{file.path}: is a gzipped Parquet file. Parquet is compressed already; unpack it with gunzip.",
            code="gzip-unsupported",
        )

    def read() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(file.path) as table:
            groups, left = _groups_from(table.metadata, first)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
                yield batch.slice(left)
                left = max(0, left - batch.num_rows)

    return read_batches(str(file.path), read(), file.max_row_mb, first)


def count_parquet(file: DataFile) -> int:
    """Rows of a Parquet file, from its metadata."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(file.path).num_rows)


def _groups_from(metadata: Any, first: int) -> tuple[list[int], int]:
    """Row groups from the one that holds row `first` on, and how many rows of that one precede it."""
    groups = list(range(metadata.num_row_groups))
    while groups and first >= (size := metadata.row_group(groups[0]).num_rows):
        first -= size
        del groups[0]
    return groups, first


def read_arrow(file: DataFile) -> Iterator[NumberedRow]:
    """Rows of an Arrow stream (as `datasets` writes it) or of an Arrow file with an index (Feather)."""
    import pyarrow as pa

    if file.is_gzip:
        raise DataError(f"{file.path}: is a gzipped Arrow file. Unpack it with gunzip.", code="gzip-unsupported")

    def read() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file.path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
            for batch in batches:
                batch.validate(full=True)  # a stream has no checksum, and a bad offset reads memory outside it
                yield batch

    return read_batches(str(file.path), read(), file.max_row_mb)


def read_batches(
    name: str, batches: Iterable[pa.RecordBatch | pa.Table], max_row_mb: float, before: int = 0
) -> Iterator[NumberedRow]:
    """Rows of batches.

    Args:
        before: number of rows before these.

    Raises:
        DataError: the bytes are damaged, two columns have one name, or a value has no counterpart in Python.
    """
    import pyarrow as pa

    number = before
    schema: pa.Schema | None = None
    clean: _Clean = _keep
    try:
        for batch in batches:
            if batch.schema != schema:  # files of a hub data set without declared features may differ
                schema, clean = batch.schema, _clean_row(name, batch.schema)
            is_small = batch.nbytes <= max_row_mb * BYTES_PER_MB
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    value = clean(row)
                    yield number, value if is_small else bound_row(value, max_row_mb)
    except DuplicateKey as error:
        raise DataError(
            f"{name_nth(name, number)}: {error.msg}. Correct or remove the row.", code="duplicate-key"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name_nth(name, number)}: broken JSON in a JSON column ({error.msg}). Correct or remove the row.",
            code="broken-json",
        ) from None
    except (pa.ArrowException, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        place = f" after row {number}" if number else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: unreadable{place}: {first[:300]}. Write or download the file again.", code="file-damaged"
        ) from None


def _keep(value: Any) -> Any:
    return value


def _clean_row(name: str, schema: pa.Schema) -> _Clean:
    repeated = find_repeated(schema.names)
    if repeated is not None:
        raise DataError(
            f"{name}: two columns are named {repeated!r}. Give each column its own name.", code="duplicate-column"
        )
    cleaners = {field.name: clean for field in schema if (clean := _cleaner(name, field.name, field.type))}

    def clean_row(row: dict[str, Any]) -> dict[str, Any]:
        for column, clean in cleaners.items():
            row[column] = clean(row[column])
        return row

    return clean_row


def _cleaner(file: str, column: str, kind: pa.DataType) -> _Clean | None:
    """Function that restores what was written from a Python value of this type; None where nothing changes."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _load_text if kind.extension_name == "arrow.json" else _cleaner(file, column, kind.storage_type)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        repeated = find_repeated(names)
        if repeated is not None:
            raise DataError(
                f"{file}: column {column} has two fields named {repeated!r}. Rename or remove one of them.",
                code="duplicate-field",
            )
        return _clean_struct({field.name: _cleaner(file, column, field.type) for field in kind})
    if types.is_map(kind):
        return _clean_map(_cleaner(file, column, kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or _is_list_view(kind):
        return _clean_list(_cleaner(file, column, kind.value_type))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _cleaner(file, column, kind.value_type)
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return _to_iso
    return _to_text if types.is_decimal(kind) or types.is_duration(kind) else None


def _to_iso(value: Any) -> str | None:
    return None if value is None else str(value.isoformat())


def _to_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_list_view(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _load_text(value: str | None) -> Any:
    return None if value is None else load_json(value)


def _clean_struct(cleaners: dict[str, _Clean | None]) -> _Clean:
    def clean_struct(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            key: clean(item) if (clean := cleaners[key]) else item for key, item in value.items() if item is not None
        }

    return clean_struct


def _clean_map(clean_item: _Clean | None) -> _Clean:
    def clean_map(pairs: list[tuple[Any, Any]] | None) -> dict[Any, Any] | None:
        if pairs is None:
            return None
        repeated = find_repeated(key for key, _ in pairs)
        if repeated is not None:
            raise DuplicateKey(f"the key {repeated!r} appears twice in one map", "", 0)
        return {key: clean_item(item) if clean_item else item for key, item in pairs}

    return clean_map


def _clean_list(clean_item: _Clean | None) -> _Clean | None:
    if clean_item is None:
        return None

    def clean_list(items: list[Any] | None) -> list[Any] | None:
        return None if items is None else [clean_item(item) for item in items]

    return clean_list
