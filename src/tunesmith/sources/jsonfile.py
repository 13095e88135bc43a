"""Read rows from JSON: JSON Lines under any name, an array of rows, one object, or one chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.jsontext import DuplicateKey, load_json
from tunesmith.sources.rowsize import RowTooLarge, bound_row

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
    if _is_json_lines(file):
        path = str(file.path)
        for number, text in enumerate(file.read_lines(), 1):
            if isinstance(text, RowTooLarge):
                yield number, text
            elif not text.isspace():
                line = JsonLine(path, number, text)
                yield number, line.parse() if parses else line
        return
    value = _load_whole(file)
    items = value if isinstance(value, list) and not _is_one_chat(value) else [value]
    is_small = file.holds_small_rows_only
    for number, item in enumerate(items, 1):
        yield number, item if is_small else bound_row(item, file.max_row_mb)


def _is_json_lines(file: DataFile) -> bool:
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


def _is_one_chat(items: list[Any]) -> bool:
    """Whether the items of an array are turns rather than rows."""
    return bool(items) and all(
        isinstance(item, dict) and any(keys <= item.keys() for keys in _TURN_KEYS) and not _ROW_KEYS & item.keys()
        for item in items
    )


def _is_json(text: str) -> bool:
    try:
        load_json(text)
    except json.JSONDecodeError:
        return False
    return True


def _load_whole(file: DataFile) -> Any:
    with file.open_text() as opened:
        text = opened.read()
    try:
        return load_json(text)
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
