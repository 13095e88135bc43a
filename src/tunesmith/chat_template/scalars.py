"""Check that a template writes the numbers, booleans and nulls of tool calls.

Such values cannot carry marks (trace.py), so all values of a turn are rendered once as numbers that occur nowhere else.
The text that the template writes around these numbers must also surround the values, with each value in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_UNIQUE = 7_340_000_000_017
_STAND_IN = re.compile(r"734000000\d{4}")


def find_lost_scalars(
    text: str, turns: Sequence[Mapping[str, Any]], turn: int, render: Callable[[Sequence[Mapping[str, Any]]], str]
) -> str | None:
    """The numbers, booleans and nulls of a turn's tool calls that the template does not write; None if it writes all.

    Args:
        text: what `render` writes for these turns.
    """
    values: list[Any] = []
    calls = [_stand_in_call(call, values) for call in turns[turn].get("tool_calls", ())]
    if not values:
        return None
    changed = render([{**t, "tool_calls": calls} if number == turn else t for number, t in enumerate(turns)])
    for number, value in enumerate(values):
        if str(_UNIQUE + number) not in changed:
            return f"the value {json.dumps(value)}"
    if _is_alike(changed, text, values):
        return None
    return ("one of the values " if len(values) > 1 else "the value ") + ", ".join(map(json.dumps, values))


def _stand_in_call(call: Mapping[str, Any], values: list[Any]) -> dict[str, Any]:
    arguments = _stand_in(call["function"]["arguments"], values)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _stand_in(value: Any, values: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _stand_in(below, values) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stand_in(item, values) for item in value]
    if isinstance(value, str):
        return value
    values.append(value)
    return _UNIQUE + len(values) - 1


def _is_alike(changed: str, text: str, values: Sequence[Any]) -> bool:
    """Whether `text` is `changed` with the values in place of the stand-in numbers."""
    at = behind = 0
    for found in _STAND_IN.finditer(changed):
        number = int(found[0]) - _UNIQUE
        if not 0 <= number < len(values):
            continue
        between = changed[at : found.start()]
        if not text.startswith(between, behind):
            return False
        behind += len(between)
        rest = changed[found.end() : found.end() + 1]
        spelled = next((s for s in _spellings(values[number]) if text.startswith(s + rest, behind)), None)
        if spelled is None:
            return False
        at, behind = found.end(), behind + len(spelled)
    return text[behind:] == changed[at:]


def _spellings(value: Any) -> list[str]:
    """The value as JSON and as Python, the longest spelling first."""
    return sorted({json.dumps(value), str(value)}, key=len, reverse=True)
