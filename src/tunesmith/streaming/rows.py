"""Read rows from any place of their sources: from a byte of JSON Lines, a row group of Parquet, a shard of the hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tunesmith.config.data_keys import DataSection
from tunesmith.sources.arrow import count_parquet, read_parquet
from tunesmith.sources.containers import read_file, require_data_file, without_rows
from tunesmith.sources.datafile import DataFile, explain_errors
from tunesmith.sources.dataset_info import convert_row, convert_rows
from tunesmith.sources.jsonfile import JsonLine, is_json_lines
from tunesmith.sources.read import RawRow, Sources
from tunesmith.sources.rowsize import RowTooLarge
from tunesmith.streaming.cursor import Cursor, Mark
from tunesmith.streaming.hub import read_hub_from

_JSON = (".json", ".jsonl", ".ndjson")
_MARKED_ROWS = 256
_POSITION = (1 << 64) - 1  # of a text file's opaque place: the byte; above it, the decoder's state

_Read = Iterator[tuple[int, Any, Mark | None]]  # number, value, the mark before this row


def count_sources(sources: Sources) -> int:
    return len(sources.files) + len(sources.hub)


def name_source(sources: Sources, number: int) -> str:
    """What the rows of a source are named after."""
    if number < len(sources.files):
        return sources.name_of(sources.files[number])
    hub_id, _, split = sources.hub[number - len(sources.files)]
    return f"{hub_id}:{split}"


def read_from(sources: Sources, cursor: Cursor, data: DataSection) -> Iterator[tuple[RawRow, Cursor]]:
    """The rows of an epoch from a place on, each with the place behind it.

    Rows between the last mark and the place are read again, but neither parsed (JSON Lines) nor labelled.

    Raises:
        DataError: as for `read_rows`.
    """
    total = cursor.total
    for source in range(cursor.source, count_sources(sources)):
        start = cursor if source == cursor.source else Cursor(source)
        rows, mark, name = start.rows, start.mark, name_source(sources, source)
        for number, value, before in read_source(sources, start, data):
            if data.limit and total >= data.limit:
                return
            mark = before or mark
            rows += 1
            total += 1
            yield RawRow(name, number, value), Cursor(source, rows, total, mark)


def read_source(sources: Sources, start: Cursor, data: DataSection) -> _Read:
    """The rows of one source from a place on."""
    if start.source < len(sources.files):
        entry = sources.entries.get(start.source)
        read = _read_file_from(DataFile(sources.files[start.source], data.encoding, data.max_row_mb), start)
    else:
        place = start.source - len(sources.files)
        entry = sources.hub_entries.get(place)
        read = read_hub_from(sources.hub[place], start, data.max_row_mb)
    if entry is None:
        yield from read
        return
    if entry.num_samples is not None:
        read = itertools.islice(read, max(0, entry.num_samples - start.rows))
    for count, (number, value, mark) in enumerate(read):
        if count or start.rows:
            yield number, convert_row(value, entry), mark
        else:  # the first row of the source: its columns are checked
            yield from ((number, value, mark) for number, value in convert_rows([(number, value)], entry))


def _read_file_from(file: DataFile, start: Cursor) -> _Read:
    require_data_file(file)
    number, is_read = 0, start.rows > 0
    with explain_errors(file, lambda: number):
        if file.container == ".parquet" and not file.is_gzip:
            rows = _read_parquet_from(file, start)
        elif file.container in _JSON and is_json_lines(file):
            rows = _read_lines_from(file, start)
        else:
            every = read_file(file.path, file.encoding, file.max_row_mb)
            rows = ((number, value, None) for number, value in itertools.islice(every, start.rows, None))
        for number, value, mark in rows:
            is_read = True
            yield number, value, mark
    if not is_read:
        raise without_rows(file.path)


def _read_parquet_from(file: DataFile, start: Cursor) -> _Read:
    """Row groups before the place are not read, so a mark only says how far the file is."""
    num_rows = max(1, count_parquet(file))
    for count, (number, value) in enumerate(read_parquet(file, start.rows), start.rows):
        is_marked = count % _MARKED_ROWS == 0
        yield number, value, {"rows": count, "share": count / num_rows} if is_marked else None


def _read_lines_from(file: DataFile, start: Cursor) -> _Read:
    """JSON Lines from the last mark on; lines up to the place are skipped as they are."""
    began = start.mark or {"rows": 0, "line": 0, "at": 0}
    rows, size = began["rows"], file.path.stat().st_size
    path = str(file.path)
    mark: Mark | None = None
    for number, (line, at) in enumerate(file.read_lines_from(began["at"]), began["line"] + 1):
        if at is not None:
            share = 0.0 if file.is_gzip else min(1.0, (at & _POSITION) / size)
            mark = {"rows": rows, "line": number - 1, "at": at, "share": share}
        if isinstance(line, str) and not line.strip():
            continue
        rows += 1
        if rows > start.rows:
            yield number, line if isinstance(line, RowTooLarge) else JsonLine(path, number, line).parse(), mark
            mark = None


def find_share(sources: Sources, cursor: Cursor, limit: int | None) -> float:
    """The share of an epoch before a place, by the files' sizes; a hub data set counts as one file of their mean."""
    sizes = [float(path.stat().st_size) for path in sources.files]
    mean = sum(sizes) / len(sizes) if sizes else 1.0
    sizes += [mean] * len(sources.hub)
    here = cursor.mark.get("share", 0.0) if cursor.mark else 0.0
    share = (sum(sizes[: cursor.source]) + here * sizes[cursor.source]) / max(1, sum(sizes))
    return float(max(share, cursor.total / limit) if limit else share)
