"""JSON in a reply: where a value ends, and what calls and arguments it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunesmith.generation.reply_patterns import CallPatterns

_PYTHON = {"True": True, "False": False, "None": None}


class JsonScanner:
    """Finds the end of a JSON value in a text that grows, reading each character once.

    Args:
        depth: of open brackets before the text.

    Attributes:
        position: the first character that is not yet read.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth, self.position = depth, 0
        self._is_inside = depth > 0
        self._in_text = self._is_escaped = self._is_scalar = False

    def feed(self, text: str) -> int | None:
        """Where the value ends; None if the text ends first.

        Args:
            text: the same text as before, with more at its end.
        """
        for place in range(self.position, len(text)):
            char = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_text:
                if char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_text = False
                    if not self.depth:
                        return self._end(place + 1)
            elif char == '"' and not self._is_scalar:
                self._in_text = self._is_inside = True
            elif char in "{[":
                self.depth += 1
                self._is_inside = True
            elif char in "}]" and self.depth:
                self.depth -= 1
                if not self.depth:
                    return self._end(place + 1)
            elif not self.depth and self._is_scalar and (char.isspace() or char in ",}])<"):
                return self._end(place)
            elif not self.depth and not char.isspace():
                self._is_scalar = True
        self.position = len(text)
        return None

    def _end(self, place: int) -> int:
        self.position = place
        return place


def find_call(text: str, patterns: CallPatterns) -> tuple[str, str] | None:
    """Name and arguments (as JSON text) of a call that is a JSON object; None if it is none."""
    assert patterns.keys is not None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in patterns.path:
        value = value.get(key, value) if isinstance(value, Mapping) else value
    name_key, arguments_key = patterns.keys
    if not isinstance(value, Mapping) or not isinstance(name := value.get(name_key), str) or not name:
        return None
    return name, read_value(json.dumps(value.get(arguments_key), ensure_ascii=False))


def read_value(text: str) -> str:
    """Arguments as the JSON text of an object: null is none, and a text may hold the object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str):
        return value if value.strip() else "{}"
    return "{}" if value is None else text


def schema_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    said = schema.get("type")
    found = {said} if isinstance(said, str) else {*filter(lambda one: isinstance(one, str), said or ())}
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            found |= schema_types(branch)
    if not found and isinstance(schema.get("enum"), list) and all(isinstance(one, str) for one in schema["enum"]):
        found = {"string"}
    return frozenset(found)


def typed_value(text: str, types: frozenset[str] | None) -> Any:
    """The value of an argument that is written as bare text.

    Args:
        types: what its schema allows. Without one, what reads as JSON other than a text is JSON.
    """
    if types == frozenset({"string"}):
        return text
    if text in _PYTHON and (not types or types & {"boolean", "null"}):
        return _PYTHON[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) and (not types or "string" in types) else value
