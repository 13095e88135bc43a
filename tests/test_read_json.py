"""JSON text: floats keep their spelling, a duplicate key is an error with its position."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from conftest import raises
from tunesmith.errors import DataError
from tunesmith.sources.jsontext import JsonFloat, load_json
from tunesmith.sources.read import find_sources, read_rows


@pytest.mark.parametrize("spelling", ["3.0", "1e5", "0.10", "-0.0", "1E+2", "1e999"])
def test_floats_keep_their_spelling(spelling: str) -> None:
    (value,) = load_json(f"[{spelling}]")
    assert isinstance(value, JsonFloat)
    assert value == float(spelling)
    assert str(value) == f"{value}" == spelling
    assert str(copy.deepcopy(value)) == str(pickle.loads(pickle.dumps(value))) == spelling


def test_other_numbers_are_as_python_reads_them() -> None:
    assert [type(value) for value in load_json("[3, NaN, Infinity, 12345678901234567890]")] == [int, float, float, int]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1, "a": 2}', 9),
        ('{"b": {"a": 1}, "c": [{"a": 1, "x": "a", "a" : 2}]}', 41),
        ('{"\\u0061": 1,\n "a": 2}', 15),
        ('{"k": "{\\"a\\": 1, \\"a\\": 2}", "a": 1, "a": 1}', 38),
    ],
)
def test_a_key_given_twice_is_an_error_with_its_place(text: str, place: int) -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        load_json(text)
    assert "'a'" in error.value.msg
    assert error.value.pos == place


@pytest.mark.parametrize(
    ("name", "text", "where", "column"),
    [
        ("x.jsonl", '{"a": 1}\n{"q": {"a": 1, "a": 2}}\n', "x.jsonl:2:", "column 16"),
        ("x.json", '[{"a": 1},\n {"a": 1,\n  "a": 2}]', "x.json:3:", "column 3"),
    ],
)
def test_a_file_with_a_key_given_twice_is_refused(
    tmp_path: Path, name: str, text: str, where: str, column: str
) -> None:
    (tmp_path / name).write_text(text)
    with raises(DataError, "duplicate-key", where, column, "'a'"):
        list(read_rows(find_sources([str(tmp_path / name)])))


CHAT = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "tool_calls": []},
    {"role": "assistant", "content": "A"},
]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 1}]


def read(tmp_path: Path, name: str, text: str) -> list[tuple[int, object]]:
    (tmp_path / name).write_text(text)
    return [(row.number, row.value) for row in read_rows(find_sources([str(tmp_path / name)]))]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_that_is_one_chat_is_one_row(tmp_path: Path, indent: int | None) -> None:
    for chat in (CHAT, SHAREGPT, CHAT[:1]):
        assert read(tmp_path, "x.json", json.dumps(chat, indent=indent)) == [(1, chat)]


def test_an_array_of_rows_with_a_role_is_no_chat(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "x", "messages": CHAT}, {"role": "user", "content": "y"}]
    assert read(tmp_path, "x.json", json.dumps(rows)) == [(1, rows[0]), (2, rows[1])]
    rows = [{"role": "r", "content": "c"}, {"id": 1}]
    assert read(tmp_path, "x.json", json.dumps(rows)) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_chats_has_a_row_each(tmp_path: Path, indent: int | None) -> None:
    assert read(tmp_path, "x.json", json.dumps([CHAT, SHAREGPT], indent=indent)) == [(1, CHAT), (2, SHAREGPT)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson"])
def test_lines_that_are_chats(tmp_path: Path, name: str) -> None:
    text = f"\n{json.dumps(CHAT)}\n\n{json.dumps(SHAREGPT)}\n"
    assert read(tmp_path, name, text) == [(2, CHAT), (4, SHAREGPT)]
    assert read(tmp_path, name, json.dumps(CHAT)) == [(1, CHAT)]


def test_chatgpts_export_is_an_array_of_objects(tmp_path: Path) -> None:
    rows = [{"title": "t", "mapping": {"a": {"message": None}}}] * 2
    assert read(tmp_path, "conversations.json", json.dumps(rows)) == [(1, rows[0]), (2, rows[1])]
