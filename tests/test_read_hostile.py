"""Damaged and hostile files give rows or a DataError, nothing else, in bounded time."""

from __future__ import annotations

import gzip
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.errors import DataError
from tunesmith.sources.read import find_sources, read_rows

ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": f"q{i} 你好"}, {"role": "assistant", "content": "a", "n": i * 0.5}],
        "note": None,
    }
    for i in range(20)
]
FLAT = [{"prompt": f'q{i}, "x"\n', "completion": "é" * i} for i in range(20)]


def arrow_bytes(compression: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, compression=compression)
    return sink.getvalue()


def stream_bytes() -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def sheet_bytes() -> bytes:
    workbook, sink = openpyxl.Workbook(), io.BytesIO()
    for row in (["prompt", "completion"], *[list(row.values()) for row in FLAT]):
        workbook.active.append(row)
    workbook.save(sink)
    return sink.getvalue()


def csv_text(delimiter: str) -> str:
    lines = [
        delimiter.join('"' + str(cell).replace('"', '""') + '"' for cell in row)
        for row in [FLAT[0].keys(), *[r.values() for r in FLAT]]
    ]
    return "\n".join(lines)


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
SEEDS: dict[str, bytes] = {
    "x.jsonl": LINES,
    "x.json": json.dumps(ROWS, indent=1).encode(),
    "chat.json": json.dumps(ROWS[0]["messages"]).encode(),
    "x.jsonl.gz": gzip.compress(LINES),
    "x.csv": csv_text(",").encode(),
    "x.tsv": csv_text("\t").encode("utf-8-sig"),
    "x.parquet": arrow_bytes("snappy"),
    "plain.parquet": arrow_bytes("none"),
    "x.arrow": stream_bytes(),
    "x.xlsx": sheet_bytes(),
    "x.txt": b"some text",
}
HOSTILE = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud83d", b'"\\u0000"', b"1" * 5000, b"1e99999", b"-" * 50, b"NaN", b"[" * 20_000,
    b'{"a":' * 20_000, b"}" * 50, b'"', b'{"a":1,"a":2}', b"\r", b"\n\n", b"\x1f\x8b\x08\x00", b"PAR1", b"\xed\xa0\x80", b"9" * 400 + b".5",
]  # fmt: skip


def flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def truncate(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(1, len(data))])


def insert(data: bytearray, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return bytes(data[:place]) + rng.choice(HOSTILE) + bytes(data[place:])


def begin_with(data: bytearray, rng: random.Random) -> bytes:
    return rng.choice(HOSTILE) + bytes(data)


def repeat(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[:start]) + bytes(data[start : start + 40]) * 5 + bytes(data[start:])


def pack(data: bytearray, rng: random.Random) -> bytes:
    packed = bytearray(gzip.compress(bytes(data), mtime=0))
    return rng.choice([bytes(packed), truncate(packed, rng), flip(packed, rng)])


MUTATIONS: list[Callable[[bytearray, random.Random], bytes]] = [flip, truncate, insert, begin_with, repeat, pack]


def read(path: Path, encoding: str = "utf-8") -> str:
    """ "rows", or what the DataError says."""
    try:
        return f"{len(list(read_rows(find_sources([str(path)]), encoding, max_row_mb=0.05)))} rows"
    except DataError as error:
        return str(error)


def test_500_damaged_files(tmp_path: Path) -> None:
    rng = random.Random(7)
    start = time.perf_counter()
    outcomes = []
    for number in range(500):
        name = rng.choice(list(SEEDS))
        content = rng.choice(MUTATIONS)(bytearray(SEEDS[name]), rng)
        ending = rng.choice(list(SEEDS)) if rng.random() < 0.15 else name  # sometimes with a wrong suffix
        path = tmp_path / f"{number}-{ending}"
        path.write_bytes(content)
        outcomes.append(read(path, rng.choice(["utf-8", "utf-8", "gb18030", "utf-16", "latin-1"])))
    assert sum(outcome.endswith(" rows") for outcome in outcomes) > 50
    assert sum(not outcome.endswith(" rows") for outcome in outcomes) > 200
    assert all(len(outcome) < 1200 for outcome in outcomes)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", SEEDS)
def test_the_undamaged_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SEEDS[name])
    assert read(tmp_path / name) == ("1 rows" if name in ("chat.json", "x.txt") else "20 rows")


@pytest.mark.parametrize("name", SEEDS)
def test_files_of_other_things(tmp_path: Path, name: str) -> None:
    for number, content in enumerate([*HOSTILE, b" ", b"\n", *SEEDS.values()]):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(content)
        read(path)


def test_hostile_notes_about_a_folder(tmp_path: Path) -> None:
    for number, content in enumerate(
        [
            *HOSTILE,
            b'{"splits": [1, null, "../x"]}',
            b'{"a": {"file_name": 3}}',
            b'{"a": {"file_name": "\\u0000"}}',
            b'{"_data_files": [{"filename": "../../etc/passwd"}]}',
        ]
    ):
        for note in ("dataset_info.json", "dataset_dict.json", "state.json", "README.md"):
            folder = tmp_path / f"{number}-{note}"
            folder.mkdir()
            (folder / "x.jsonl").write_bytes(LINES)
            for other in ("dataset_info.json", "state.json"):
                (folder / other).write_bytes(content)
            (folder / note).write_bytes(content)
            read(folder)
