"""One file -> its rows, whatever it is written in. The container is told from name and first bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tunesmith.data.jsontext import load_json
from tunesmith.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")

NumberedRow = tuple[int, Any]


def container_of(path: Path) -> str | None:
    """The ending that says how a file is written, without .gz; None if unknown."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def read_file(path: Path) -> Iterator[NumberedRow]:
    """Every row with its number, 1-based: the first line of a JSON Lines or CSV row, else the item.

    Raises:
        DataError: a file that is unreadable, empty, broken or of unknown kind ends the reading at once.
    """
    container = container_of(path)
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_text, ".md": _read_text}
    if container is None:
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}, plain or .gz.")
    number = 0
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.")
        for number, value in readers.get(container, _read_json)(path):
            yield number, value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}{_line_of(path, error)}). "
            "Save the file as UTF-8."
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(f"{path}: cannot be read{behind}: damaged gzip ({error}). Copy the file anew.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if number == 0:
        raise DataError(f"{path}: the file holds no rows.")


def _line_of(path: Path, error: UnicodeDecodeError) -> str:
    """Where the bad byte stands; the decoder itself only knows the place in its current block."""
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return f" in line {number}"
    except (OSError, EOFError, zlib.error):
        return ""
    return ""


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[NumberedRow]:
    """A JSON array, or JSON Lines whatever the file is called, or one object over several lines."""
    with _open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        yield from _read_json_array(path)
        return
    if first.lstrip().startswith("{") and container_of(path) == ".json" and not _is_json(first):
        yield 1, _load_whole(path)
        return
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_line(path, number, line)


def _is_json(text: str) -> bool:
    try:
        load_json(text)
    except json.JSONDecodeError:
        return False
    return True


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return load_json(line)
    except json.JSONDecodeError as error:
        shown = line.strip()
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise DataError(
            f"{path}:{number}: broken JSON ({error.msg} at column {error.colno}): {shown}\n"
            "Each line must be one whole JSON object. Mend or remove the line."
        ) from None


def _load_whole(path: Path) -> Any:
    with _open_text(path) as file:
        text = file.read()
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}). Mend the file from there on."
        ) from None


def _read_json_array(path: Path) -> Iterator[NumberedRow]:
    rows = _load_whole(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__}, not a list of rows.")
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(1 << 30)
    with _open_text(path, newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max("\t" if container_of(path) == ".tsv" else ",", ";", "\t", key=header.count)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        last_line = 0
        try:
            for row in reader:
                last_line = reader.line_num
                fields = [field for value in row.values() for field in (value if isinstance(value, list) else [value])]
                number = last_line - sum(len(_LINE_BREAK.findall(field)) for field in fields if field)
                if None in row or None in row.values():
                    found = len(fields) if None in row else len(fields) - fields.count(None)
                    raise DataError(
                        f"{path}:{number}: the row does not have the {len(reader.fieldnames or [])} fields of the "
                        f"header ({found} found). Quote fields that hold {delimiter!r}."
                    )
                yield number, row
        except csv.Error as error:
            raise DataError(f"{path}:{last_line + 1}: broken CSV ({error}). Mend the row that begins there.") from None


def _read_text(path: Path) -> Iterator[NumberedRow]:
    """A text file is one document; it is split to max_seq_len later, without loss."""
    with _open_text(path, newline="") as file:
        yield 1, {"text": file.read()}


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa  # slow to import, needed by few
    import pyarrow.parquet as pq

    if _is_gzip(path):
        raise DataError(f"{path}: a gzipped Parquet file. Parquet is compressed inside; unpack it with gunzip.")
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
