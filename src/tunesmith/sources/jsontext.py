"""Parse JSON text: floats keep their spelling, a duplicate key is an error, all errors are of one class."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)
_COLON = re.compile(r"\s*:")


class JsonFloat(float):
    """A float whose str() is its text in the file: "3.0", "1e5", "0.10". repr() and json.dumps are float's own."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> JsonFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # copy and pickle keep the spelling
        return (self.text,)


class DuplicateKey(json.JSONDecodeError):
    """A key appears twice in one object; Python would keep the last value."""


class LongNumber(json.JSONDecodeError):
    """An integer has more digits than Python reads."""


class _Duplicate(ValueError):
    """Raised inside the decoder, whose hooks do not know the position."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def find_repeated(names: Iterable[str]) -> str | None:
    """The first name that repeats an earlier one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Duplicate(find_repeated(key for key, _ in pairs) or "")
    return value


_DECODER = json.JSONDecoder(parse_float=JsonFloat, object_pairs_hook=_object_of)


def load_json(text: str) -> Any:
    """The value of a JSON text; its floats are JsonFloat.

    Raises:
        JSONDecodeError: with the position; also where Python raises errors of other classes.
        DuplicateKey: a JSONDecodeError too.
    """
    return _explained(lambda: _DECODER.decode(text), text, 0)


def load_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, and the position after it.

    Raises:
        JSONDecodeError: as `load_json`.
    """
    found: tuple[Any, int] = _explained(lambda: _DECODER.raw_decode(text, start), text, start)
    return found


def _explained(decode: Callable[[], Any], text: str, start: int) -> Any:
    """What the decoder returns for a text from `start` on, with all of its errors as JSONDecodeError."""
    try:
        return decode()
    except json.JSONDecodeError:
        raise
    except _Duplicate as duplicate:
        key = duplicate.key if len(duplicate.key) <= 80 else duplicate.key[:77] + "..."
        place = _find_duplicate(text, start)
        raise DuplicateKey(f"the key {key!r} appears twice in one object", text, place) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text, start)) from None
    except ValueError:  # from int(), which takes only so many digits
        limit = sys.get_int_max_str_digits()
        place = _find_long_number(text, start, limit)
        raise LongNumber(f"a number of more than {limit} digits", text, place) from None


def _find_duplicate(text: str, start: int = 0) -> int:
    """Position of the first key that repeats another key of its object."""
    keys_above: list[set[str]] = []  # one set for each open bracket; that of a list stays empty
    for found in _STRING_OR_BRACKET.finditer(text, start):
        mark = found.group()
        if mark in ("[", "{"):
            keys_above.append(set())
        elif mark in ("]", "}"):
            keys_above.pop()
        elif _COLON.match(text, found.end()):
            key = json.loads(mark, strict=False)
            if key in keys_above[-1]:
                return found.start()
            keys_above[-1].add(key)
    return start


def _find_long_number(text: str, start: int, limit: int) -> int:
    """Position of the first integer of more than `limit` digits outside of strings; `start` if none is found."""
    pattern = rf'"[^"\\]*(?:\\.[^"\\]*)*"|(?<![\d.eE+])\d{{{limit + 1},}}(?![\d.eE])'
    for found in re.compile(pattern, re.DOTALL).finditer(text, start):
        if not found.group().startswith('"'):
            return found.start()
    return start


def _deepest(text: str, start: int = 0) -> int:
    """Position of the innermost bracket."""
    depth = greatest = 0
    place = start
    for found in _STRING_OR_BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > greatest:
            greatest, place = depth, found.start()
    return place


def parse_json_list(value: Any) -> Any:
    """The list in a JSON text (CSV stores lists of turns so); any other value stays."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return load_json(value)
        except json.JSONDecodeError:
            return value
    return value
