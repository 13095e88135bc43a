"""A row above data.max_row_mb is never parsed: a marker takes its place, and memory stays bounded."""

from __future__ import annotations

import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import run_apart
from tunesmith.config.data_keys import DataSection
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.sources.rowsize import RowTooLarge, measure_row

SMALL = {"text": "x"}
MB = 1_000_000


def read(path: Path, max_row_mb: float = 0.01) -> list[tuple[int, Any]]:
    return [(row.number, row.value) for row in read_rows(find_sources([str(path)]), max_row_mb=max_row_mb)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"])
def test_a_large_row_is_a_marker_in_every_container(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [SMALL, {"text": "y" * 20_000}, SMALL])
    numbers, values = zip(*read(path), strict=True)
    assert values[0] == values[2] == SMALL
    assert isinstance(values[1], RowTooLarge)
    assert values[1].size_bytes >= 10_000
    assert numbers == ((2, 3, 4) if name == "x.csv" else (1, 2, 3))
    assert [value for _, value in read(path, max_row_mb=1)] == [SMALL, {"text": "y" * 20_000}, SMALL]


def test_the_bound_is_of_bytes_not_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "水" * 3000}, {"text": "水" * 3400}, {"text": "y" * 9900}])
    kinds = [type(value) for _, value in read(path)]
    assert kinds == [dict, RowTooLarge, dict]


def test_the_reason_says_what_to_do() -> None:
    reason = RowTooLarge(52_300_000, 16.0).reason
    assert "data.max_row_mb 16 " in reason
    assert "52.3 MB" in reason
    assert DataSection(train=["x"]).max_row_mb == 16


def test_large_lines_at_the_beginning_and_the_end(tmp_path: Path) -> None:
    large = json.dumps({"text": "y" * 20_000})
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text(f"{large}\n{json.dumps(SMALL)}\n{large}")
        kinds = [type(value) for _, value in read(tmp_path / name)]
        assert kinds == [RowTooLarge, dict, RowTooLarge]
    turns = json.dumps([{"role": "user", "content": "y" * 20_000}])
    (tmp_path / "y.jsonl").write_text(f"{turns}\n[]\n")
    assert [type(value) for _, value in read(tmp_path / "y.jsonl")] == [RowTooLarge, list]


def test_an_array_on_one_line_may_be_larger_than_a_row(tmp_path: Path) -> None:
    rows = [{"text": "y" * 6000}] * 10
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(json.dumps(rows))
        assert [value for _, value in read(tmp_path / name)] == rows


def test_a_document_may_have_any_size(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("y" * 20_000)
    assert read(tmp_path / "x.txt") == [(1, {"text": "y" * 20_000})]


def test_counting_stops_early() -> None:
    deep: Any = "x"
    for _ in range(50_000):
        deep = [deep]
    assert measure_row({"a": deep}, MB) < MB
    start = time.perf_counter()
    assert measure_row([["y" * 1000] * 1000] * 100_000, MB) <= 2 * MB
    assert time.perf_counter() - start < 1


def test_memory_stays_a_small_multiple_of_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(200):
            file.write("水y" * (MB // 4))
        file.write('"}\n{"text": "x"}\n')
    code = (
        "import resource, sys\n"
        "from tunesmith.sources.read import find_sources, read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = list(read_rows(find_sources([sys.argv[1]])))\n"
        "print(rows[0].value.size_bytes, rows[1].number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    start = time.perf_counter()
    size, number, grown_kb = map(int, run_apart(code, path).split())
    assert (size, number) == (200 * MB + 13, 2)
    assert grown_kb < 150_000  # about nine times the bound of 16 MB
    assert time.perf_counter() - start < 20
