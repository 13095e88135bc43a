"""Arrow: only the keys that Arrow added are removed; maps become dicts; save_to_disk folders are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from conftest import raises
from tunesmith.errors import DataError
from tunesmith.sources.read import find_sources, read_rows

# two rows of different shapes, as people write them: no key is null below the top
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"}],
        "tools": [{"name": "f", "parameters": {"x": {"type": "int"}}}],
        "system": None,
        "note": '{"until": null}',
    },
    {
        "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"y": [{"z": 1}, {}]}}]}],
        "tools": [],
        "system": "s",
        "note": None,
    },
]


def values(*names: object) -> list[Any]:
    return [row.value for row in read_rows(find_sources([str(name) for name in names]))]


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    assert table.to_pylist() != ROWS  # Arrow has added keys
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    assert values(tmp_path / "x.parquet") == ROWS


def test_json_keeps_every_null(tmp_path: Path) -> None:
    row = {"a": None, "b": {"c": None, "d": [{"e": None}]}}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert values(tmp_path / "x.jsonl") == [row]


def test_maps_are_dicts_and_keep_their_nulls(tmp_path: Path) -> None:
    kind = pa.struct(
        {
            "arguments": pa.map_(pa.string(), pa.struct({"a": pa.int64(), "b": pa.int64()})),
            "none": pa.map_(pa.string(), pa.int64()),
        }
    )
    rows = [
        {"call": [{"arguments": [("x", {"a": 1}), ("y", None)], "none": None}, {"arguments": [], "none": [("z", 1)]}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"call": pa.list_(kind)})), tmp_path / "x.parquet")
    assert values(tmp_path / "x.parquet") == [
        {"call": [{"arguments": {"x": {"a": 1}, "y": None}}, {"arguments": {}, "none": {"z": 1}}]}
    ]


def test_a_map_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    column = pa.array([[("k", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"m": column}), tmp_path / "x.parquet")
    with raises(DataError, "duplicate-key", "x.parquet:2:", "'k'"):
        values(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.string_view(),
    ],
    ids=str,
)
def test_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "a"], pa.string()).cast(kind)
    turns = pa.array(
        [[{"role": "user", "extra": None}], [], None],
        pa.large_list(pa.struct({"role": pa.large_string(), "extra": pa.string()})),
    )
    pq.write_table(pa.table({"text": column, "turns": turns}), tmp_path / "x.parquet")
    assert values(tmp_path / "x.parquet") == [
        {"text": "a", "turns": [{"role": "user"}]}, {"text": None, "turns": []}, {"text": "a", "turns": None}
    ]  # fmt: skip


def test_columns_and_fields_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two = pa.array(["1"]), pa.array(["2"])
    pq.write_table(pa.Table.from_arrays([one, two], names=["text", "text"]), tmp_path / "x.parquet")
    with raises(DataError, "duplicate-column", "x.parquet:", "'text'"):
        values(tmp_path / "x.parquet")
    struct = pa.StructArray.from_arrays([one, two], names=["role", "role"])
    pq.write_table(pa.table({"turn": struct}), tmp_path / "y.parquet")
    with raises(DataError, "duplicate-field", "y.parquet:", "turn", "'role'"):
        values(tmp_path / "y.parquet")


def test_feather_and_arrow_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pyarrow.feather.write_feather(table, tmp_path / "indexed.arrow")
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "indexed.arrow") == ROWS == values(tmp_path / "stream.arrow")


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS * 2).save_to_disk(tmp_path / "d", num_shards=2)
    (tmp_path / "d" / "cache-1.arrow").write_bytes(b"not data")
    assert values(tmp_path / "d") == ROWS * 2
    assert [row.where for row in read_rows(find_sources([str(tmp_path / "d")]))][2].endswith(
        "data-00001-of-00002.arrow:1"
    )


def test_a_saved_dataset_dict(tmp_path: Path) -> None:
    parts = {"train": ROWS, "test_sft": ROWS[:1], "validation": ROWS[1:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "d")
    assert values(tmp_path / "d") == ROWS
    assert values(f"{tmp_path / 'd'}:test_sft") == values(f"{tmp_path / 'd'}:test") == ROWS[:1]
    assert values(f"{tmp_path / 'd'}:dev")[0]["system"] == "s"
    with raises(DataError, "split-not-found", "'nope'", "test, train, validation"):
        values(f"{tmp_path / 'd'}:nope")
    (tmp_path / "d" / "train" / "data-00000-of-00001.arrow").unlink()
    with raises(DataError, "saved-dataset-incomplete", "data-00000-of-00001.arrow"):
        values(tmp_path / "d")


def test_a_data_set_with_json_columns_keeps_their_nulls(tmp_path: Path) -> None:
    """`datasets` keeps values of mixed types as JSON text of an extension type."""
    rows = [{"tools": [{"a": 1}, {"b": {"until": None}}]}, {"tools": [{"a": "s"}]}]
    saved = datasets.Dataset.from_list(rows, features=datasets.Features({"tools": datasets.List(datasets.Json())}))
    saved.save_to_disk(tmp_path / "d")
    saved.to_parquet(tmp_path / "x.parquet")
    assert values(tmp_path / "d") == rows == values(tmp_path / "x.parquet")


def test_hub_rows_lose_what_arrow_added(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: x.jsonl\n---\n")
    sources = find_sources([str(tmp_path)])
    assert sources.hub
    assert [row.value for row in read_rows(sources)] == ROWS
    assert [row.value for row in read_rows(find_sources([f"{tmp_path}:default:train"]), max_row_mb=0.0001)] != ROWS
