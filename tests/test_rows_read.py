"""Promise 9: every key of a row is read, known to be irrelevant, or named."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from conftest import raises
from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.conversation import Conversation, Parsed, RawText, RowRefused, UnknownFormat
from tunesmith.rows.format_table import FORMAT_TABLE, Shape
from tunesmith.rows.formats import FORMATS, detect_format, parse_row
from tunesmith.rows.keys import is_irrelevant

WORD = "Zyxwomat"
Path = tuple[Any, ...]
STRUCTURE = {"role", "from", "type", "label", "content_type", "current_node", "parent", "children"}
"""Keys whose values steer the reading; another word there is another row."""


def texts_of(parsed: Parsed) -> str:
    """Everything of a row that can reach a template or a label."""
    if isinstance(parsed, RawText):
        return parsed.text
    if not isinstance(parsed, Conversation):
        return "".join(text for text, _ in parsed.parts)
    messages = [message.to_template() for message in parsed.messages]
    return json.dumps([messages, parsed.tools, dict(parsed.template_kwargs), parsed.documents], ensure_ascii=False)


Check = Callable[[Any, Shape], str]


def read_words(row: Any, shape: Shape) -> str:
    """Everything that is reported about a row: its texts and notes, or the reason of its refusal.

    Can be replaced by a check of the rendered text.
    """
    try:
        parsed = parse_row(row, "auto", FieldsSection(**shape.fields))
    except RowRefused as refusal:
        return refusal.reason
    return texts_of(parsed) + "\n" + "\n".join(parsed.notes)


def leaves_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The path of every string in a value, including those in JSON text."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from leaves_of(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from leaves_of(below, (*path, number))
    elif isinstance(value, str):
        yield path, value


def mappings_of(value: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, Mapping):
        yield path
    below = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in below:
        yield from mappings_of(item, (*path, key))


def replaced(row: Any, path: Path, new: Any) -> Any:
    row = copy.deepcopy(row)
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return row


def plant(text: str) -> str:
    """Insert a word into a text; JSON text stays valid."""
    if text[:1] in "[{":
        return text.replace("weather", WORD).replace("Rome", WORD)
    return f"{text} {WORD}"


@pytest.fixture
def read() -> Check:
    return read_words


SHAPES = [pytest.param(shape, id=f"{number}-{shape.whose}") for number, shape in enumerate(FORMAT_TABLE)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised_and_read_without_a_note(shape: Shape) -> None:
    parsed = parse_row(shape.example, "auto", FieldsSection(**shape.fields))
    assert parsed.notes == ()
    name = detect_format(shape.example, FieldsSection(**shape.fields))
    assert FORMATS[str(name)] is FORMATS[shape.format]
    assert parse_row(shape.example, shape.format, FieldsSection(**shape.fields)) == parsed


@pytest.mark.parametrize("shape", SHAPES)
def test_a_word_in_any_field_is_found_again(shape: Shape, read: Check) -> None:
    for path, text in leaves_of(shape.example):
        key = str(path[-1]) if isinstance(path[-1], str) else str(next(k for k in path[::-1] if isinstance(k, str)))
        if key in STRUCTURE or is_irrelevant(key) or key in ("id", "recipient"):
            continue
        if key == "title" and shape.format == "chatgpt_export":
            continue
        said = read(replaced(shape.example, path, plant(text)), shape)
        assert WORD in said, f"{path} is lost: {said}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", ["zebra", "user_context", "thinkings", "system_note", "input_text", "train_me"])
def test_an_unknown_key_anywhere_is_named(shape: Shape, key: str, read: Check) -> None:
    values = [WORD, [WORD], {"a": [WORD]}, [{"role": "user", "content": WORD}], True]
    for path in mappings_of(shape.example):
        if path == ("mapping",):
            continue  # its keys are names of nodes
        for value in values:
            said = read(replaced(shape.example, (*path, key), value), shape)
            assert key in said or WORD in said, f"{key} at {path} is lost: {said}"


KNOWN_NAMES = (
    "tools", "functions", "thinking", "reasoning", "function_call", "tool_calls", "name", "text", "content", "value",
    "system", "history", "context", "input", "output", "instruction", "prompt", "completion", "query", "response",
    "documents", "messages", "conversations", "parts", "question", "answer", "answers", "target", "summary",
    "parameters", "arguments", "args", "label",
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_key_in_a_place_of_another_kind_is_named_or_refused(shape: Shape, read: Check) -> None:
    """A `tools` inside a part, a `thinking` next to a call: keys read in one place must not be dropped in another."""
    for path in mappings_of(shape.example):
        if path == ("mapping",):
            continue  # its keys are names of nodes
        here = shape.example
        for step in path:
            here = here[step]
        for key in set(KNOWN_NAMES) - set(here):
            for value in (WORD, [{"name": WORD}], [{"type": "text", "text": WORD}]):
                row = replaced(shape.example, (*path, key), value)
                said = read(row, shape)
                assert key in said or WORD in said or not is_used(row, shape), f"{key} at {path} is lost: {said}"


def is_used(row: Any, shape: Shape) -> bool:
    try:
        parse_row(row, "auto", FieldsSection(**shape.fields))
    except RowRefused:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_context_columns_refuse_the_row_unless_ignored(shape: Shape) -> None:
    row = {**shape.example, "background_passage": WORD}
    fields = FieldsSection(**shape.fields)
    with raises(RowRefused, "unread-context", "--data.ignore_columns background_passage"):
        parse_row(row, "auto", fields)
    assert parse_row(row, "auto", fields, ["background_passage"]) == parse_row(shape.example, "auto", fields)


@pytest.mark.parametrize(
    "key", ["id", "prompt_id", "data_source", "question_type", "url", "score", "created_at", "model"]
)
def test_irrelevant_keys_are_left_out_in_silence(key: str) -> None:
    for shape in FORMAT_TABLE:
        row = {**shape.example, key: WORD}
        parsed = parse_row(row, "auto", FieldsSection(**shape.fields))
        assert parsed == parse_row(shape.example, "auto", FieldsSection(**shape.fields))


@pytest.mark.parametrize("key", ["source", "type", "metadata", "intent"])
def test_a_sentence_under_an_irrelevant_name_is_named(key: str) -> None:
    text = "Here stands what somebody wrote about the question, in more words than any id or category would ever have."
    for value in (text, ["x", text]):
        parsed = parse_row({"prompt": "Q", "completion": "A", key: value}, "auto", FieldsSection())
        assert parsed.notes == (f"column {key} is not read",)


def test_bytes_count_as_text() -> None:
    row = {"prompt": "Q", "completion": "A", "zebra": b"bytes", "context": b"bytes"}
    with raises(UnknownFormat, "unread-context", "context"):
        parse_row(row, "auto", FieldsSection())
    assert parse_row(row, "auto", FieldsSection(), ["context"]).notes == ("column zebra is not read",)


def test_row_numbers_of_pandas_are_no_column() -> None:
    row = {"Unnamed: 0": "7", "": "7", "__index_level_0__": 7, "prompt": "Q", "completion": "A"}
    assert parse_row(row, "auto", FieldsSection()).notes == ()


@pytest.mark.parametrize("value", [None, "", "  ", [], {}, [None], {"a": ""}, 3, 2.5, [1, 2], {"a": 1}])
def test_empty_values_and_numbers_are_no_loss(value: Any) -> None:
    row = {"prompt": "Q", "completion": "A"}
    assert parse_row({**row, "zebra": value, "user_context": value}, "auto", FieldsSection()) == parse_row(
        row, "auto", FieldsSection()
    )


def test_a_column_that_repeats_a_turn_is_no_loss() -> None:
    row = {"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A"}]}
    assert parse_row(row, "auto", FieldsSection()).notes == ()
    assert parse_row({**row, "prompt": "Other"}, "auto", FieldsSection()).notes == ("column prompt is not read",)


@pytest.mark.parametrize("key", ["reasoning_details", "context"])
def test_a_list_that_repeats_what_was_read_is_no_loss(key: str) -> None:
    """OpenRouter gives the reasoning both as a text and in parts."""
    turn = {
        "role": "assistant",
        "content": "A",
        "reasoning": "Think",
        key: [{"type": "reasoning.text", "text": "Think"}],
    }
    row = {"messages": [{"role": "user", "content": "Q"}, turn]}
    assert parse_row(row, "auto", FieldsSection()).notes == ()
    turn[key] = [{"type": "reasoning.text", "text": "Think"}, {"type": "reasoning.text", "text": "More"}]
    with raises(RowRefused, "unread-context", key):
        parse_row(row, "auto", FieldsSection())


def test_a_flag_never_counts_as_a_repetition() -> None:
    with raises(RowRefused, "unread-context", "train_on"):
        parse_row({"prompt": "Q", "completion": "last", "train_on": "last"}, "auto", FieldsSection())


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("weight", 0.5, True),
        ("weight", 1.0, False),
        ("weight", "0.5", True),
        ("loss", 2.31, False),  # measured
        ("loss", 0, True),
        ("train_loss", 0.5, False),
        ("train", False, True),
        ("used_in_training", "Ultra", False),
        ("train_on", "assistant", True),
        ("roles_to_train", ["assistant"], True),
        ("loss_mask", [1, 0], True),
        ("loss_mask", "[1, 0]", True),
        ("weights", [0.0, 1.0], True),
        ("weights", [1, 1.0], False),
        ("attention_mask", [1, 0], False),
        ("tool_choice", "auto", False),
        ("function_call", "auto", False),
        ("function_call", '{"name": "f"}', True),
        ("reasoning_effort", "high", False),
        ("Unnamed: 0", "7", False),
        ("", "7", False),
        ("input_tokens", 77, False),
        ("is_reasoning_complete", [True, False], False),
        ("context_length", 77, False),
        ("systemPrompt", "Be brief", True),
        ("Chat-History", [["a", "b"]], True),
        ("tool_name", "t", False),
        ("original_question", "Why?", False),
    ],
)
def test_names_decide_what_an_unread_column_is(key: str, value: Any, is_refused: bool) -> None:
    row = {"prompt": "Q", "completion": "A", key: value}
    if is_refused:
        with raises(RowRefused, "unread-context", key):
            parse_row(row, "auto", FieldsSection())
    else:
        parse_row(row, "auto", FieldsSection())


@pytest.mark.parametrize("part", [part for part in FieldsSection.model_fields if part not in ("role", "content")])
def test_a_mapped_column_is_read_or_refused(part: str, read: Check) -> None:
    """Whatever is mapped, in any format, its text is read or the row is refused."""
    for shape in FORMAT_TABLE:
        row = {**shape.example, "extra": f"true {WORD}"}
        fields = {**shape.fields, part: "extra"}
        said = read(row, dataclasses.replace(shape, fields=fields))
        assert WORD in said or "extra" in said or not is_used(row, dataclasses.replace(shape, fields=fields)), said


@pytest.mark.parametrize("part", ["completion", "system", "history", "input", "output", "reasoning"])
def test_one_column_is_not_two_parts(part: str) -> None:
    fields = FieldsSection(**{"prompt": "q", part: "q"})
    with raises(UnknownFormat, "column-mapped-twice", "data.fields.prompt", f"data.fields.{part}", " q"):
        parse_row({"q": "Q", "a": "A"}, "auto", fields)
