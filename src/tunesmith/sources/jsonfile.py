"""Read rows from JSON: JSON Lines under any name, an array of rows, one object, or one chat."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.jsonarray import ArrayReader
from tunesmith.sources.jsontext import DuplicateKey, load_json
from tunesmith.sources.rowsize import BYTES_PER_MB, RowTooLarge, bound_row, measure_row

_TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
_ROW_KEYS = {"messages", "conversations", "conversation", "prompt", "completion", "instruction", "output", "text"}

NumberedRow = tuple[int, Any]


@dataclass(frozen=True, slots=True)
class JsonLine:
    """A row of JSON Lines that is parsed later, perhaps in another process."""

    path: str
    number: int
    text: str

    def parse(self) -> Any:
        """Raises:
        DataError: the line is broken.
        """
        try:
            return load_json(self.text)
        except json.JSONDecodeError as error:
            shown = self.text.strip()
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            advice = "Each line must be one whole JSON object. Correct or remove the line."
            raise _explain(f"{self.path}:{self.number}", error, f": {shown}", advice) from None


def read_json(file: DataFile, parses: bool = True) -> Iterator[NumberedRow]:
    """Every row with its line number, or its index in an array.

    Args:
        parses: off: lines are JsonLine.
    """
    if is_json_lines(file):
        path = str(file.path)
        for number, text in enumerate(file.read_lines(), 1):
            if isinstance(text, RowTooLarge):
                yield number, text
            elif not text.isspace():
                line = JsonLine(path, number, text)
                yield number, line.parse() if parses else line
        return
    if _first_character(file) == "[":
        yield from _read_array(file)
        return
    value = _load_whole(file)
    yield 1, value if file.holds_small_rows_only else bound_row(value, file.max_row_mb)


def _read_array(file: DataFile) -> Iterator[NumberedRow]:
    """Rows of an array, or the one chat whose turns its items are."""
    with _explained(file), file.open_text() as text:
        turns = _read_chat(ArrayReader(text, file.max_row_mb).items(), file.max_row_bytes)
    if turns is not None:
        yield 1, turns if isinstance(turns, RowTooLarge) else bound_row(turns, file.max_row_mb)
        return
    with _explained(file), file.open_text() as text:
        yield from enumerate(ArrayReader(text, file.max_row_mb).items(), 1)


def _read_chat(items: Iterator[Any], max_bytes: int) -> list[Any] | RowTooLarge | None:
    """The items of an array if they are turns rather than rows; RowTooLarge where there are too many to hold."""
    turns: list[Any] = []
    size = 0
    for item in items:
        if not _is_turn(item):
            return None
        size += measure_row(item, max_bytes)
        if size <= max_bytes:
            turns.append(item)
    if not size:
        return None
    return turns if size <= max_bytes else RowTooLarge(size, max_bytes / BYTES_PER_MB)


def is_json_lines(file: DataFile) -> bool:
    """Whether the first line is a whole value; a list counts as a row only if other lines follow."""
    start = _first_character(file)
    if start not in ("[", "{"):
        return True  # the error names the line
    is_named_json = file.container == ".json"
    if start == "{" and not is_named_json:
        return True
    lines = (line for line in file.read_lines() if isinstance(line, RowTooLarge) or line.strip())
    first = next(lines)
    if start == "[" and next(lines, None) is None:
        return False
    if isinstance(first, RowTooLarge):
        return start == "{" or not is_named_json
    return _is_json(first)


def _first_character(file: DataFile) -> str:
    with file.open_text() as text:
        while piece := text.readline(4096):
            if piece.strip():
                return piece.lstrip()[0]
    return ""


def _is_turn(item: Any) -> bool:
    """Whether an item of an array is a turn of one chat rather than a row."""
    return isinstance(item, dict) and any(keys <= item.keys() for keys in _TURN_KEYS) and not _ROW_KEYS & item.keys()


def _is_json(text: str) -> bool:
    try:
        load_json(text)
    except json.JSONDecodeError:
        return False
    return True


def _load_whole(file: DataFile) -> Any:
    with file.open_text() as opened:
        text = opened.read()
    with _explained(file):
        return load_json(text)


@contextlib.contextmanager
def _explained(file: DataFile) -> Iterator[None]:
    """Name the line of a JSON error."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise _explain(f"{file.path}:{error.lineno}", error, "", "Correct the file from there on.") from None


def _explain(where: str, error: json.JSONDecodeError, shown: str, advice: str) -> DataError:
    joined = "\n" if shown else ". "
    if isinstance(error, DuplicateKey):
        advice = "Most programs keep one of the two values and lose the other. Rename or remove one of the two."
        return DataError(f"{where}: {error.msg} (column {error.colno}){shown}{joined}{advice}", code="duplicate-key")
    return DataError(
        f"{where}: broken JSON ({error.msg} at column {error.colno}){shown}{joined}{advice}", code="broken-json"
    )
