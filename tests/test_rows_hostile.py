"""Any row is parsed or refused with a reason; no other exception escapes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from test_rows_read import texts_of
from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.conversation import Conversation, RawText, RowRefused, Segments
from tunesmith.rows.format_table import FORMAT_TABLE
from tunesmith.rows.formats import FORMATS, parse_row


def deep(depth: int, is_list: bool) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


JUNK: list[Any] = [
    None, "", " ", "x", "[", "{", "[]", "{}", "[1]", '{"a": 1}', '[{"role": 1}]', '{"name": 5}', "\ud800", 0, 1, -1, 2.5,
    float("nan"), float("inf"), 10**5000, True, False, [], {}, [None], [[]], [{}], {"a": None}, ["x", 1], [["q", "a"]],
    {"role": "user"}, [{"role": "assistant", "content": None}], [{"type": "text"}], {"name": None}, {1: 2}, {None: "x"},
    {("a", 1): "x"}, b"bytes", object(), {"a", "b"}, ("q", "a"), deep(50, True), deep(50, False), deep(5000, True),
    deep(5000, False), {"function": []}, {"type": []}, {"type": {}}, [{"type": ["text"]}], {"parts": 3}, "x" * 10_000,
]  # fmt: skip
KEYS: list[Any] = [1, None, ("a",), True, 2.5, "", ".", "a.b", "role", "type", "content", "system", "tools", "history",
                   "train_detail", "loss", "thinking", "\ud800", "x" * 500]  # fmt: skip


def places_of(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a value, down to a realistic depth."""
    if depth > 20:
        return found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        found.append((value, key))
        places_of(below, found, depth + 1)
    return found


def junk(rng: random.Random) -> Any:
    """New junk for each call, since later mutations change it."""
    value = rng.choice(JUNK)
    try:
        return copy.deepcopy(value)
    except RecursionError:  # nested too deeply to copy and to mutate
        return value


def mutate(row: Any, rng: random.Random) -> Any:
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        places = places_of(row, [])
        if not places:
            return row
        container, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            container[key] = junk(rng)
        elif action < 0.75:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(KEYS)] = junk(rng)
        else:
            container.insert(key, junk(rng))
    return row


def is_parsed_or_refused(row: Any, format_name: str, fields: FieldsSection) -> bool:
    """Whether the row was parsed; any exception other than a refusal fails the test."""
    try:
        parsed = parse_row(row, format_name, fields)
    except RowRefused as refusal:
        assert refusal.reason  # noqa: PT017  # counted below, not expected
        return False
    assert isinstance(parsed, (Conversation, RawText, Segments))
    texts_of(parsed).encode()
    return True


@pytest.mark.parametrize("seed", range(4))
def test_mutated_rows_are_parsed_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    num_parsed = 0
    for _ in range(1000):
        shape = rng.choice(FORMAT_TABLE)
        row = mutate(shape.example, rng)
        name = "auto" if rng.random() < 0.7 else rng.choice([*FORMATS])
        fields = dict(shape.fields)
        if rng.random() < 0.3:
            fields[rng.choice([*FieldsSection.model_fields])] = rng.choice(
                [*filter(str.strip, map(str, row)), "a.0", "messages.0.content"]
            )
        num_parsed += is_parsed_or_refused(row, name, FieldsSection(**fields))
    assert num_parsed > 100


@pytest.mark.parametrize("number_of_junk", range(len(JUNK)))
def test_junk_in_every_place_is_parsed_or_refused(number_of_junk: int) -> None:
    value = JUNK[number_of_junk]
    is_parsed_or_refused(value, "auto", FieldsSection())
    is_parsed_or_refused([value], "auto", FieldsSection())
    for shape in FORMAT_TABLE:
        for number in range(len(places_of(shape.example, []))):
            row = copy.deepcopy(shape.example)
            container, key = places_of(row, [])[number]
            container[key] = value
            is_parsed_or_refused(row, "auto", FieldsSection(**shape.fields))


def test_a_row_that_holds_itself_is_refused() -> None:
    row: dict[str, Any] = {"prompt": "Q", "completion": "A"}
    row["zebra"] = [row]
    is_parsed_or_refused(row, "auto", FieldsSection())
    tools: list[Any] = [{"name": "t"}]
    tools[0]["parameters"] = tools
    assert not is_parsed_or_refused({"prompt": "Q", "completion": "A", "tools": tools}, "auto", FieldsSection())
