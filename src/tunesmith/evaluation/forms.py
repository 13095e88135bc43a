"""Scores of a reply's form: repetition, loops, and JSON where the reference is JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.generation.matching import split_words
from tunesmith.report.replies import repeats_itself

_SHORTEST_LOOP = 32  # characters; shorter replies may end in "!!!!"
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n?```", re.DOTALL)


def distinct_share(text: str, order: int) -> float | None:
    """Different n-grams of words over all (distinct-n; Li et al. 2016, here of each reply); None where it has none."""
    words = split_words(text)
    grams = [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]
    return len(set(grams)) / len(grams) if grams else None


def is_loop(text: str) -> bool:
    """Whether the end of a reply is one piece over and over."""
    return len(text) >= _SHORTEST_LOOP and repeats_itself(text)


@dataclass(frozen=True, slots=True)
class JsonText:
    """The JSON object or array that a text is.

    Attributes:
        is_fenced: whether it is in a Markdown code block, of which the text has nothing else.
    """

    value: Any
    is_fenced: bool


def read_reference(text: str) -> JsonText | None:
    """The JSON object or array that a reference is; None where it is other text."""
    block = _FENCED.fullmatch(text.strip())
    loaded = load_json(block[1] if block else text)
    return JsonText(loaded, block is not None) if isinstance(loaded, (dict, list)) else None


def read_like(reference: JsonText, reply: str) -> Any:
    """The JSON value of a reply; in a code block only where the reference is in one. INVALID where it is not JSON."""
    block = _FENCED.fullmatch(reply.strip()) if reference.is_fenced else None
    return load_json(block[1] if block else reply)


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID = _Invalid()


def load_json(text: str) -> Any:
    """The value of a JSON text as RFC 8259 has it; INVALID where it is not one."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_refuse_repeated)
    except (ValueError, RecursionError):
        return INVALID


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _refuse_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def is_same_json(one: Any, two: Any) -> bool:
    """Whether two JSON values are equal; true is not 1, and 1 is 1.0."""
    return spell_json(one) == spell_json(two)


def spell_json(value: Any) -> str:
    """One spelling for equal JSON values."""
    try:
        return json.dumps(_plain(value), sort_keys=True)
    except (ValueError, TypeError, RecursionError):
        return f"not JSON: {value!r}"[:10_000]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(below) for below in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
