"""A file of JSON -> its rows: JSON Lines whatever the file is called, an array of rows, one object, one chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.datafile import DataFile
from tunesmith.sources.jsontext import DuplicateKey, load_json
from tunesmith.sources.rowsize import RowTooLarge, bound_row

_TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
_ROW_KEYS = {"messages", "conversations", "conversation", "prompt", "completion", "instruction", "output", "text"}

NumberedRow = tuple[int, Any]


def read_json(file: DataFile) -> Iterator[NumberedRow]:
    """Every row with the number of its line, or of its item in an array."""
    if _is_json_lines(file):
        for number, line in enumerate(file.read_lines(), 1):
            if isinstance(line, RowTooLarge):
                yield number, line
            elif line.strip():
                yield number, _parse_line(file, number, line)
        return
    value = _load_whole(file)
    items = value if isinstance(value, list) and not _is_one_chat(value) else [value]
    is_small = file.holds_small_rows_only
    for number, item in enumerate(items, 1):
        yield number, item if is_small else bound_row(item, file.max_row_mb)


def _is_json_lines(file: DataFile) -> bool:
    """Whether the first line is a value of its own; a list must be followed by other lines to count as a row."""
    start = _first_character(file)
    if start not in ("[", "{"):
        return True  # the error will name the line
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
    """An array whose items are turns, and not rows."""
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


def _parse_line(file: DataFile, number: int, line: str) -> Any:
    try:
        return load_json(line)
    except json.JSONDecodeError as error:
        shown = line.strip()
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        advice = "Each line must be one whole JSON object. Mend or remove the line."
        raise _explain(f"{file.path}:{number}", error, f": {shown}", advice) from None


def _load_whole(file: DataFile) -> Any:
    with file.open_text() as opened:
        text = opened.read()
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise _explain(f"{file.path}:{error.lineno}", error, "", "Mend the file from there on.") from None


def _explain(where: str, error: json.JSONDecodeError, shown: str, advice: str) -> DataError:
    if isinstance(error, DuplicateKey):
        what = f"{error.msg} (column {error.colno})"
        advice = "Programs keep one of the two values and lose the other. Rename or remove one of the two."
    else:
        what = f"broken JSON ({error.msg} at column {error.colno})"
    return DataError(f"{where}: {what}{shown}{chr(10) if shown else '. '}{advice}")
