"""JSON text -> values, with one kind of error whatever is wrong with the text."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', re.DOTALL)


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONDecodeError: with the place; also for what Python itself stops at with errors of other kinds.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except ValueError:  # from int(), which takes only so many digits
        limit = sys.get_int_max_str_digits()
        number = re.search(rf"\d{{{limit + 1},}}", text)
        reason = f"a number of more than {limit} digits"
        raise json.JSONDecodeError(reason, text, number.start() if number else 0) from None


def _deepest(text: str) -> int:
    """Where the innermost bracket stands."""
    depth = greatest = place = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > greatest:
            greatest, place = depth, found.start()
    return place
