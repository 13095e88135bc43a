"""Random JSON arrays, valid and damaged: read as a stream in pieces of any size, they give what the whole text gives."""

from __future__ import annotations

import io
import json
import os
import random
from typing import Any

import pytest

from tunesmith.sources import jsonarray
from tunesmith.sources.jsonarray import ArrayReader
from tunesmith.sources.jsontext import load_json

NUMBERS = ("1.5", "-0", "0", "12", "1e5", "1E-3", "-1.25e+10", "12345678901234567890", "0.10", "NaN", "Infinity",
           "-Infinity", "true", "false", "null", "3e0", "9" * 70 + ".5")  # fmt: skip
TEXTS = ("a", "é", "\\n", '\\"', "\\\\", "\\u0041", "\\ud83d\\ude00", "\\ud800", "😀", "[", "]", "{", "}", ",", ":", " ",
         "\u2028", "\u3000")  # fmt: skip
SPACES = ("", "", "", " ", "\n", "\r\n", "\t", "  \n ")
DAMAGE = (
    ",",
    "]",
    "}",
    "[",
    "{",
    '"',
    "\\",
    "1",
    "-",
    ".",
    "e",
    "x",
    "\ufeff",
    " ",
    "\x00",
    "\u00a0",
    "+",
    "//",
    "tru",
)
PIECES = (1, 2, 3, 5, 64, 1 << 20)


def outcome(read: Any) -> tuple[Any, ...]:
    try:
        return "items", repr(read())
    except json.JSONDecodeError as error:
        return type(error), error.msg, error.lineno, error.colno


def make_value(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(16)
    if kind < 3 or depth > 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return '"' + "".join(rng.choices(TEXTS, k=rng.randrange(12))) + '"'
    values = [make_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 11:
        return make_list(rng, values)
    pairs = [f'"k{n if rng.random() > 0.02 else 0}"{space(rng)}:{space(rng)}{value}' for n, value in enumerate(values)]
    return "{" + make_list(rng, pairs)[1:-1] + "}"


def make_list(rng: random.Random, values: list[str]) -> str:
    return "[" + ",".join(f"{space(rng)}{value}{space(rng)}" for value in values or [""]) + "]"


def space(rng: random.Random) -> str:
    return rng.choice(SPACES)


def make_text(rng: random.Random) -> str:
    text = make_list(rng, [make_value(rng) for _ in range(rng.randrange(5))]) + space(rng)
    at = rng.randrange(1, len(text) + 1)
    return rng.choice((text, text[:at], text[:at] + rng.choice(DAMAGE) + text[at + rng.randrange(2) :]))


def test_any_text_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for _ in range(100_000 if os.environ.get("TUNESMITH_LONG") else 1500):
        text = make_text(rng)
        whole = outcome(lambda text=text: load_json(text))
        for piece in PIECES:
            monkeypatch.setattr(jsonarray, "_PIECE", piece)
            found = outcome(lambda text=text: list(ArrayReader(io.StringIO(text), 16.0).items()))
            assert found == whole, (piece, text)


@pytest.mark.parametrize(
    "text", ["[1.5]", "[12.5e+3, 1]", "[1E-5]", '[{"a": ' + "1" * 6000 + ".5}]", "[" + "1" * 6000 + "e5, 1]",
             '["' + "1" * 6000 + '", ' + "1" * 6000 + "]"]
)  # fmt: skip
def test_numbers_that_are_cut(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome(lambda: load_json(text))
    for piece in (*range(1, 12), 100, 4400, *range(5995, 6012)):
        monkeypatch.setattr(jsonarray, "_PIECE", piece)
        assert outcome(lambda: list(ArrayReader(io.StringIO(text), 16.0).items())) == whole, piece
