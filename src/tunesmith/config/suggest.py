"""Suggest what a mistyped word was meant to be."""

from __future__ import annotations

from collections.abc import Iterable

_NEVER = 99
_SHORT = 6  # letters


def edit_distance(one: str, other: str, limit: int) -> int:
    """Letters to insert, delete, replace or swap with their neighbour; a number above `limit` counts as far away."""
    if abs(len(one) - len(other)) > limit:
        return _NEVER
    before, last = [0] * (len(other) + 1), list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        now = [row]
        for column, theirs in enumerate(other, start=1):
            cost = min(last[column] + 1, now[-1] + 1, last[column - 1] + (letter != theirs))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == theirs:
                cost = min(cost, before[column - 2] + 1)
            now.append(cost)
        if min(now) > limit:
            return _NEVER
        before, last = last, now
    return last[-1] if last[-1] <= limit else _NEVER


def suggest_words(word: str, known: Iterable[str]) -> list[str]:
    """The known words that are nearest to a mistyped one; at most two, none where none is near."""
    typed = _plain(word)
    return _nearest({name: _distance(typed, _plain(name)) for name in known})


def suggest_keys(key: str, known: Iterable[str]) -> list[str]:
    """The same for a dotted key, which may also lack its section or have another one."""
    typed = _plain(key)
    name = typed.rpartition(".")[2]
    scores: dict[str, float] = {}
    for dotted in known:
        theirs = _plain(dotted)
        whole: float = _distance(typed, theirs)
        part = _distance(name, theirs.rpartition(".")[2]) + 0.5
        if part > 0.5 and _section(typed) not in ("", _section(theirs)):
            part += 1  # another section and another name: further away than a typo in one of them
        scores[dotted] = min(whole, part)
    return _nearest(scores)


def did_you_mean(found: list[str], dashes: str = "") -> str:
    """ "; did you mean ...?", or "" where nothing is near."""
    return f"; did you mean {' or '.join(dashes + name for name in found)}?" if found else ""


def _nearest(scores: dict[str, float] | dict[str, int]) -> list[str]:
    best = min(scores.values(), default=_NEVER)
    found = [name for name, score in scores.items() if score == best < _NEVER]
    return found if len(found) <= 2 else []


def _distance(typed: str, known: str) -> int:
    """Edit distance; short words that differ in two letters and their first are unrelated: serve and merge.

    Words that a known one begins with are near it: api_key and api_key_file.
    """
    if len(typed) > _SHORT and known.startswith(f"{typed}_"):
        return _allowed(typed)
    distance = edit_distance(typed, known, _allowed(typed))
    is_short = len(typed) <= _SHORT and distance > 1
    return _NEVER if is_short and typed[:1] != known[:1] else distance


def _allowed(word: str) -> int:
    """Wrong letters for which a word is still recognised."""
    length = len(word)
    return 0 if length <= 1 else 1 if length <= 4 else 2 if length <= 8 else 3


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _section(dotted: str) -> str:
    return dotted.partition(".")[0] if "." in dotted else ""
