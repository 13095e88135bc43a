"""Single values of a row: missing values, text, JSON inside text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tunesmith.rows.conversation import RowRefused
from tunesmith.sources.jsontext import load_json

_INFINITE = (math.inf, -math.inf)


def is_missing(value: Any) -> bool:
    """Whether a value is null, or NaN as Parquet and pandas write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def json_type(value: Any) -> str:
    """What a value is, in words for a message: an object, a list, text, a number ..."""
    names: tuple[tuple[Any, str], ...] = (
        (dict, "an object"), (list, "a list"), (str, "text"), (bool, "true or false"), ((int, float), "a number"),
        (type(None), "null"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def as_text(value: Any, what: str) -> str:
    """Text unchanged, a number as spelled in the file, "" for a missing value."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in _INFINITE:
        try:
            return str(value)
        except ValueError:  # Python limits the digits of an integer
            raise RowRefused(f"{what} is a number with too many digits", code="number-too-long") from None
    raise RowRefused(f"{what} is {json_type(value)}, not text", code="value-not-text")


def show(value: Any) -> str:
    """A value for a message, at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits
        return json_type(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_json(value: Any, what: str) -> Any:
    """The value of a JSON text; other values are returned unchanged.

    Raises:
        RowRefused: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except json.JSONDecodeError as error:
        raise RowRefused(f"{what} is not JSON ({error.msg} at character {error.pos})", code="not-json") from None


def plain_numbers(value: Any) -> Any:
    """JSON with ordinary floats, as chat templates get them in serving; a JsonFloat would keep its spelling."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain_numbers(below) for key, below in value.items()}
    if isinstance(value, list):
        return [plain_numbers(item) for item in value]
    return value


def holds_content(value: Any, with_flags: bool = True) -> bool:
    """Whether a value contains, at any depth, non-blank text or bytes, or a flag."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, (Mapping, list, tuple)):
            if id(item) in seen:  # a row made in Python may contain itself
                continue
            seen.add(id(item))
        if (with_flags and isinstance(item, bool)) or (isinstance(item, (str, bytes)) and item.strip()):
            return True
        if isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return False
