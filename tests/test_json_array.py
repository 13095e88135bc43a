"""A JSON array that is read as a stream gives the rows and the errors of the whole text, in bounded memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from conftest import run_apart
from tunesmith.errors import DataError
from tunesmith.sources import jsonarray
from tunesmith.sources.containers import read_file
from tunesmith.sources.jsonarray import ArrayReader
from tunesmith.sources.jsontext import DuplicateKey, load_json
from tunesmith.sources.rowsize import RowTooLarge


@pytest.fixture(params=[1, 7, 1 << 20])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is read at once."""
    size: int = request.param
    monkeypatch.setattr(jsonarray, "_PIECE", size)
    return size


def outcome(read: Any) -> tuple[Any, ...]:
    """The items, or the class and place of the error."""
    try:
        return "items", repr(read())
    except json.JSONDecodeError as error:
        return type(error), error.msg, error.lineno, error.colno


def stream(path: Path, text: str, max_row_mb: float = 16.0) -> tuple[Any, ...]:
    path.write_text(text, encoding="utf-8")
    with path.open(encoding="utf-8") as opened:
        return outcome(lambda: list(ArrayReader(opened, max_row_mb).items()))


VALID = ["[]", " [ ] \n", "[1]", "[1,2.50 , 3e5]\n", '[{"a": [1, {"b": "]}"}]}, "x\\"],", null,\n true]', '["\\\\", "\\u4e2d"]',
         "[12345678901234567890, -1.0]", "[[[]], {}]"]  # fmt: skip
BROKEN = ["[", "[1", "[1,", "[1 2]", "[1,]", "[,1]", "[1]]", "[1] x", '[{"a": 1} {"b": 2}]', '[{"a": 1,}]', '[{"a" 1}]',
          "[nul]", '["a\nb"]', '["abc', '[{"a": "b"', '["\\x"]', '[1,\n 2,\n  {"a": 1, "a": 2}]', "[" * 3000, "[tru",
          "[1,\n\n2,\n x]", "[1}", '[{"a": 1]', "[" + "9" * 5000 + "]", "[-]", "[1.]", "[01]", '[{1: 2}]', "[}", '["a",\n"b"\n"c"]']  # fmt: skip


@pytest.mark.parametrize("text", VALID)
def test_the_items_are_those_of_the_whole_text(tmp_path: Path, piece: int, text: str) -> None:
    assert stream(tmp_path / "a.json", text) == ("items", repr(load_json(text)))


@pytest.mark.parametrize("text", BROKEN)
def test_the_errors_are_those_of_the_whole_text(tmp_path: Path, piece: int, text: str) -> None:
    """Class, line and column; a text that is cut may be said to be so in other words."""
    whole, found = outcome(lambda: load_json(text)), stream(tmp_path / "a.json", text)
    if text.startswith("[[["):  # at most a bracket apart
        assert found[1] == whole[1] or found[0] is whole[0]
        return
    assert found == whole


def test_texts_with_one_damaged_character(tmp_path: Path, piece: int) -> None:
    rng = random.Random(0)
    rows = [{"messages": [{"role": "user", "content": f'a\n{n} \\ " 中'}], "n": [1.50, None, n]} for n in range(4)]
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    for _ in range(150):
        at = rng.randrange(1, len(text))
        damaged = text[:at] + rng.choice(["", "]", "}", '"', ",", "x", "\\", "\n", "["]) + text[at + 1 :]
        assert stream(tmp_path / "a.json", damaged) == outcome(lambda damaged=damaged: load_json(damaged)), damaged


def test_a_large_item_is_passed_over(tmp_path: Path, piece: int) -> None:
    large = ['"' + 'x\\"]' * 9000 + '"', '{"a": "' + "}\\\\" * 9000 + '"}', "[" + "[1],\n" * 9000 + "2]"]
    path = tmp_path / "a.json"
    path.write_text("[1, " + ",\n".join(large) + ', {"b": 2}]')
    with path.open() as opened:
        first, *found, last = ArrayReader(opened, 0.002).items()
    assert (first, last) == (1, {"b": 2})
    assert [type(item) for item in found] == [RowTooLarge] * 3
    for end in (1, 100, 9000):
        path.write_text("[1, " + large[1][:-end])
        with path.open() as opened, pytest.raises(json.JSONDecodeError) as error:
            list(ArrayReader(opened, 0.002).items())
        assert error.value.lineno == 1


def rows_of(path: Path, text: str, max_row_mb: float = 16.0) -> list[Any]:
    path.write_text(text)
    return [value for _, value in read_file(path, max_row_mb=max_row_mb)]


def test_one_chat_and_many_rows(tmp_path: Path) -> None:
    turn, row = {"role": "user", "content": "x" * 30}, {"instruction": "Q", "output": "A"}
    path = tmp_path / "a.json"
    assert rows_of(path, json.dumps([turn] * 3, indent=1)) == [[turn] * 3]
    assert rows_of(path, json.dumps([turn, row], indent=1)) == [turn, row]
    [large] = rows_of(path, json.dumps([turn] * 3000, indent=1), 0.01)
    assert isinstance(large, RowTooLarge)
    assert len(rows_of(path, json.dumps([turn] * 3000 + [row], indent=1), 0.01)) == 3001


def test_errors_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"a\.json:3: .*twice.*column 10") as error:
        rows_of(path, '[\n{"a": 1},\n{"a": 1, "a": 2}]')
    assert error.value.code == "duplicate-key"
    with pytest.raises(DataError, match=r"a\.json:2: broken JSON .*column 9") as error:
        rows_of(path, '[{"a": 1},\n{"a": 1 "b": 2}]')
    assert error.value.code == "broken-json"
    assert DuplicateKey


def test_memory_does_not_grow_with_the_array(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom tunesmith.sources.containers import read_file\n"
        "count = sum(1 for _ in read_file(Path(sys.argv[1])))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    row = json.dumps({"instruction": "What?" * 20, "output": "That. " * 50})
    peaks = []
    for times in (2_000, 60_000):
        path = tmp_path / f"{times}.json"
        path.write_text("[" + ",\n".join([row] * times) + "]")
        count, peak = map(int, run_apart(code, path).split())
        assert count == times
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 12_000, peaks  # held whole: 60 MB more
