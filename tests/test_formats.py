"""Every known format is parsed to the same Conversation; rows that must not be trained are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import raises
from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.conversation import (
    NOTE_EMPTY_CONTEXT,
    NOTE_EMPTY_QUESTION,
    NOTE_UNANSWERED,
    Conversation,
    RawText,
    RowRefused,
    UnknownFormat,
)
from tunesmith.rows.formats import parse_row
from tunesmith.sources.jsontext import JsonFloat

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}


def parse(row: Any, format_name: str = "auto", **fields: str) -> Conversation:
    parsed = parse_row(row, format_name, FieldsSection(**fields))
    assert isinstance(parsed, Conversation)
    return parsed


def turns(row: Any, format_name: str = "auto", **fields: str) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in parse(row, format_name, **fields).messages]


SAME = [("system", "S"), ("user", "Q"), ("assistant", "A")]
SAME_TURNS = [{"role": r, "content": c} for r, c in SAME]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [{"role": r, "content": c} for r, c in SAME]}, {}),
        ({"conversations": [{"role": r, "content": c} for r, c in SAME]}, {}),
        ({"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {}),
        ({"prompt": "Q", "completion": "A", "system": "S"}, {}),
        ({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
          "completion": [{"role": "assistant", "content": "A"}]}, {}),
        ({"instruction": "Q", "input": "", "output": "A", "system": "S"}, {}),
        ({"instruction": "Q", "response": "A", "system": "S", "input": None}, {}),
        ({"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, {}),
        ({"question": "Q", "answer": "A", "sys": "S"}, {"prompt": "question", "completion": "answer", "system": "sys"}),
        ({"id": 1, "turns": [{"speaker": r, "text": c} for r, c in SAME]},
         {"messages": "turns", "role": "speaker", "content": "text"}),
        ({"messages": '[{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, {}),
        ({"messages": [{"role": r, "content": [{"type": "text", "value": c}], "loss_weight": float(r == "assistant")} for r, c in SAME]}, {}),
        ({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]}, {}),
        ({"instruction": "", "context": "Q", "response": "A", "category": "qa", "system": "S"}, {}),
        ({"conversation": [{"system": "S", "input": "Q", "output": "A", "id": 1}]}, {}),
        ({"instruction": "Q", "instances": [{"input": "", "output": "A"}], "system": "S"},
         {"output": "instances.0.output", "input": "instances.0.input"}),
    ],
)  # fmt: skip
def test_every_format_gives_the_same_chat(row: dict[str, Any], fields: dict[str, str]) -> None:
    assert turns(row, **fields) == SAME


def test_alpaca_input_and_history() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}
    assert turns(row) == [("user", "hi"), ("assistant", "hello"), ("user", "Add\n1 2"), ("assistant", "3")]


def test_dollys_context_is_read_like_alpacas_input() -> None:
    row = {"instruction": "When?", "context": "Born in 1912.", "response": "1912", "category": "closed_qa"}
    assert turns(row)[0] == ("user", "When?\nBorn in 1912.")
    assert turns({**row, "input": ""})[0] == ("user", "When?\nBorn in 1912.")
    assert turns({**row, "input": "He."})[0] == ("user", "When?\nHe.\nBorn in 1912.")


def test_a_turns_name_is_kept() -> None:
    messages = [{"role": "user", "name": "ann", "content": "Q"}, {"role": "assistant", "content": "A"}]
    chat = parse({"messages": messages})
    assert [m.to_template() for m in chat.messages] == messages


def test_numbers_are_written_as_their_file_writes_them() -> None:
    nan = float("nan")
    assert turns({"prompt": 6.5, "completion": 42.0}) == [("user", "6.5"), ("assistant", "42.0")]
    assert turns({"prompt": JsonFloat("3.0"), "completion": JsonFloat("1e5")}) == [
        ("user", "3.0"),
        ("assistant", "1e5"),
    ]
    assert turns(user_assistant(42))[1] == ("assistant", "42")
    assert turns({"instruction": "Q", "input": nan, "output": "A", "history": nan, "system": nan, "tools": nan}) == [
        ("user", "Q"),
        ("assistant", "A"),
    ]
    assert turns(user_assistant("A", image=nan)) == [("user", "Q"), ("assistant", "A")]
    weighted = {"role": "assistant", "content": "A", "loss_weight": nan}
    assert parse({"messages": [{"role": "user", "content": "Q"}, weighted]}).messages[1].is_trained


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"prompt": " ", "completion": "A"}, NOTE_EMPTY_QUESTION),
        ({"prompt": [{"role": "system", "content": "S"}], "completion": "A"}, NOTE_EMPTY_QUESTION),
        ({"instruction": "", "input": None, "output": "A"}, NOTE_EMPTY_QUESTION),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "A"}]}, NOTE_EMPTY_QUESTION),
        ({"messages": [{"role": "system", "content": None}, *SAME_TURNS[1:]]}, NOTE_EMPTY_CONTEXT),
        ({"messages": [*SAME_TURNS, {"role": "tool", "content": None}, SAME_TURNS[2]]}, NOTE_EMPTY_CONTEXT),
    ],
)  # fmt: skip
def test_empty_questions_are_counted(row: dict[str, Any], note: str) -> None:
    assert parse(row).notes == (note,)


def test_no_note_where_nothing_is_missing() -> None:
    assert parse({"messages": SAME_TURNS}).notes == ()
    carries_tools = {"role": "system", "content": "", "tools": '[{"name": "t"}]'}  # MiniMind
    assert parse({"messages": [carries_tools, *SAME_TURNS[1:]]}).notes == ()


def test_sharegpt_tool_calls() -> None:
    chat = parse({
        "tools": '[{"name": "weather", "parameters": {"city": {"type": "string", "enum": null}}}]',
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "No."},
        ],
    })  # fmt: skip
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1].tool_calls[0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    schema = {"name": "weather", "parameters": {"city": {"type": "string", "enum": None}}}
    assert chat.tools == ({"type": "function", "function": schema},)  # wrapped; a null of JSON stays


def test_openai_tool_calls_with_json_arguments_and_null_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chat = parse({"tools": [WEATHER], "messages": [
        {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
    ]})  # fmt: skip
    assert chat.messages[1].tool_calls == (call,)  # the id, and the arguments' text as in the row


def test_typed_parts_of_reasoning_and_tool_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"}, {"type": "text", "value": "Let me look."},
        {"type": "tool_call", "value": '{"name": "weather", "arguments": {}}'},
    ]  # fmt: skip
    reply = parse(
        {"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": parts}]}
    ).messages[1]
    assert (reply.reasoning_content, reply.content, len(reply.tool_calls)) == ("hm", "Let me look.", 1)


def test_minimind_keeps_tools_in_the_system_turn() -> None:
    chat = parse({"conversations": [
        {"role": "system", "content": "S", "tools": '[{"name": "t"}]'},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "t", "arguments": {"a": 1}}]'},
    ]})  # fmt: skip
    assert chat.tools == ({"type": "function", "function": {"name": "t"}},)
    assert chat.messages[2].tool_calls[0]["function"]["arguments"] == {"a": 1}


def test_raw_text() -> None:
    assert parse_row({"text": "abc"}, "auto", FieldsSection()) == RawText("abc")
    poem = {"title": "t", "paragraphs": ["a", "b"]}
    assert parse_row(poem, "auto", FieldsSection(text="paragraphs")) == RawText("a\nb", ("column title is not read",))


def test_loss_weight_zero_is_not_trained() -> None:
    rows = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss_weight": 0},
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "B", "loss_weight": 1.0}]  # fmt: skip
    assert [m.is_trained for m in parse({"messages": rows}).messages if m.role == "assistant"] == [False, True]


def test_a_prompt_list_is_context_even_where_the_assistant_speaks_in_it() -> None:
    chat = parse({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
                  "completion": "d"})  # fmt: skip
    assert [m.content for m in chat.messages if m.is_trained] == ["d"]


def test_an_unanswered_last_turn_is_left_off_and_counted() -> None:
    rows = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    chat = parse({"messages": rows})
    assert [m.content for m in chat.messages] == ["a", "b"]
    assert chat.notes == (NOTE_UNANSWERED,)


def user_assistant(reply: Any, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": reply}], **extra}


def nested(depth: int) -> list[Any]:
    tool: dict[str, Any] = {"name": "t"}
    for _ in range(depth):
        tool = {"a": tool}
    return [tool]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (user_assistant("  "), "reply-empty"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no-assistant-turn"),
        ({"messages": []}, "no-turns"),
        ({"messages": [{"role": "wizard", "content": "Q"}]}, "unknown-role"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "value-not-text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "media-not-supported"),
        (user_assistant("Hi, I am {{name}}."), "placeholder-in-reply"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss_weight": 0.5}]}, "weight-not-binary"),
        ({"messages": [{"role": "user", "content": "Q", "loss_weight": 1.0}, {"role": "assistant", "content": "A"}]}, "flag-outside-reply"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss_weight": 0}]}, "nothing-to-train"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "{oops"}]}, "not-json"),
        ({"prompt": "Q", "completion": None}, "column-missing"),
        ({"text": "   "}, "text-empty"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "history-not-pairs"),
        ({"instruction": "Q", "output": "A", "history": 5}, "history-not-pairs"),
        ({"instruction": "Q", "output": ["A"]}, "value-not-text"),
        ({"prompt": "Q", "completion": float("nan")}, "column-missing"),
        ({"prompt": "Q", "completion": float("inf")}, "value-not-text"),
        (user_assistant(float("nan")), "reply-empty"),
        ({"messages": [{"role": "user", "text": "Q"}, {"role": "assistant", "content": "A"}]}, "turn-key-missing"),
        ({"messages": [{"role": "user", "name": {"a": 1}, "content": "Q"}, {"role": "assistant", "content": "A"}]}, "value-not-text"),
        ({"conversation": [{"system": "S", "input": "Q", "output": "A"}, {"system": "T", "input": "Q", "output": "A"}]}, "system-prompt-differs"),
        ({"conversation": [{"input": "Q", "output": "A"}, {"system": "T", "input": "Q", "output": "A"}]}, "system-prompt-differs"),
        (user_assistant("hi \ud83d"), "lone-surrogate"),
        ({"text": "hi \ud83d"}, "lone-surrogate"),
        (user_assistant("A", tools=[{"name": "t", "d": "\udc00"}]), "lone-surrogate"),
        (user_assistant("A", tools=[{"function": "t"}]), "tools-not-list"),
        (user_assistant("A", tools=nested(3000)), "nested-too-deeply"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "[" * 200_000}]}, "not-json"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": '{"a": ' + "1" * 5000 + "}"}]}, "not-json"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_the_reason(row: dict[str, Any], code: str) -> None:
    with raises(RowRefused, code):
        parse_row(row, "auto", FieldsSection())


def test_a_reason_names_the_turn_the_key_and_the_value() -> None:
    turn = {"role": "user", "text": "Q"}
    with raises(RowRefused, "turn-key-missing", "turn 0", "role, text"):
        parse_row({"messages": [turn, SAME_TURNS[2]]}, "auto", FieldsSection())
    with raises(RowRefused, "unknown-role", "turn 0", "'wizard'"):
        parse_row({"messages": [{"role": "wizard", "content": "Q"}]}, "auto", FieldsSection())
    with raises(RowRefused, "lone-surrogate", r"'\ud83d'"):
        parse_row(user_assistant("hi \ud83d"), "auto", FieldsSection())
    with raises(RowRefused, "system-prompt-differs", "turn 1 of conversation"):
        pairs = [{"input": "Q", "output": "A"}, {"system": "T", "input": "Q", "output": "A"}]
        parse_row({"conversation": pairs}, "auto", FieldsSection())


def test_placeholders_in_code_are_code() -> None:
    assert parse(user_assistant("Write `{{name}}` or ```html\n<p>{{name}}</p>\n```")).messages[1].is_trained
    assert parse(user_assistant("A dict of sets: {{1}, {2}}; {{ spaced }} is Jinja")).messages[1].is_trained


DPO = {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "good"},
       "rejected": {"from": "gpt", "value": "bad"}}  # fmt: skip
KTO_ROWS = [user_assistant("good", label=True), user_assistant("bad", label=False)]


@pytest.mark.parametrize("format_name", ["auto", "messages", "sharegpt"])
def test_preference_data_is_refused_with_the_mapping_that_trains_the_chosen_side(format_name: str) -> None:
    mapping = "--data.format prompt_completion --data.fields.prompt conversations --data.fields.completion chosen"
    with raises(UnknownFormat, "preference-data", mapping):
        parse_row(DPO, format_name, FieldsSection())
    assert turns(DPO, "prompt_completion", prompt="conversations", completion="chosen") == [
        ("user", "Q"),
        ("assistant", "good"),
    ]


@pytest.mark.parametrize("fields", [{}, {"messages": "messages"}])
def test_kto_rows_with_label_false_are_never_trained(fields: dict[str, str]) -> None:
    for row in KTO_ROWS:
        with raises(UnknownFormat, "preference-data", "--data.fields.label label"):
            parse_row(row, "auto", FieldsSection(**fields))
    assert turns(KTO_ROWS[0], label="label")[-1] == ("assistant", "good")
    with raises(RowRefused, "rejected-reply") as rejected:
        parse_row(KTO_ROWS[1], "auto", FieldsSection(label="label"))
    assert rejected.value.by_choice


@pytest.mark.parametrize("value", [False, True, "False", "TRUE", " false "])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "output": "A"},
        {"messages": SAME_TURNS},
        {"conversation": [{"input": "Q", "output": "A"}]},
    ],
)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_rejected_replies_are_refused_in_every_spelling(row: dict[str, Any], column: str, value: Any) -> None:
    with raises(UnknownFormat, "preference-data", f"--data.fields.label {column}"):
        parse({**row, column: value})
    if "true" in str(value).lower():
        assert turns({**row, column: value}, label=column) == turns(row)
    else:
        with raises(RowRefused, "rejected-reply", column):
            parse({**row, column: value}, label=column)


@pytest.mark.parametrize("value", [0, 1, "0", "1", 0.0])
def test_0_and_1_are_labels_next_to_chat_columns_only(value: Any) -> None:
    for row in ({"prompt": "Q", "completion": "A"}, {"messages": SAME_TURNS}):
        with raises(UnknownFormat, "preference-data", "--data.fields.label label"):
            parse({**row, "label": value})
    assert turns({"instruction": "Is it so?", "output": "yes", "label": value})
    assert turns({"question": "Is it so?", "answer": "yes", "label": value}, prompt="question", completion="answer")


@pytest.mark.parametrize("value", ["sports", 7, None, "", 0.5])
def test_a_label_of_another_kind_is_no_preference(value: Any) -> None:
    row = {"prompt": "Q", "completion": "A", "label": value}
    assert turns(row) == [("user", "Q"), ("assistant", "A")]
    with raises(RowRefused, "label-not-boolean", "label"):
        parse(row, label="label")


def test_a_label_beside_raw_text_is_no_preference() -> None:
    notes = ("column label is not read",)
    assert parse_row({"text": "abc", "label": False}, "auto", FieldsSection()) == RawText("abc", notes)


@pytest.mark.parametrize(
    ("row", "fields", "absent"),
    [
        ({"q": "Q", "o": "A"}, {"instruction": "qq", "output": "o"}, "qq"),
        ({"prompt": "Q", "completion": "A"}, {"system": "syss"}, "syss"),
        ({"instruction": "Q", "output": "A"}, {"input": "inp"}, "inp"),
        ({"instruction": "Q", "output": "A"}, {"history": "hist"}, "hist"),
        ({"messages": SAME_TURNS}, {"tools": "functions"}, "functions"),
        ({"messages": SAME_TURNS}, {"label": "good"}, "good"),
        ({"text": "abc"}, {"text": "body"}, "body"),
        ({"a": [1]}, {"text": "a.3"}, "a.3"),
        ({"messages": SAME_TURNS}, {"messages": "messages.\u00b2"}, "messages.\u00b2"),
    ],
)  # fmt: skip
def test_a_mapped_column_that_is_absent_refuses_the_row(row: Any, fields: dict[str, str], absent: str) -> None:
    with raises(UnknownFormat, "mapped-column-missing", absent, f"Keys found: {', '.join(row)}"):
        parse_row(row, "auto", FieldsSection(**fields))


def test_mapped_columns_may_be_null_where_the_part_is_optional() -> None:
    row = {"q": "Q", "i": None, "o": "A", "s": None, "h": None, "t": None}
    fields = {"instruction": "q", "input": "i", "output": "o", "system": "s", "history": "h", "tools": "t"}
    assert turns(row, **fields) == [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize("fields", [{"role": "speaker"}, {"content": "words"}])
def test_mapped_keys_of_turns_must_be_there_too(fields: dict[str, str]) -> None:
    with pytest.raises(UnknownFormat) as refusal:
        parse({"messages": SAME_TURNS}, **fields)
    assert refusal.value.code in ("turn-key-missing", "unknown-format")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "[{'role': 'user', 'content': 'Q'}]"}, "messages is a Python repr"),
        ({"conversations": '[{"from": "human"'}, "conversations begins like a list"),
        ({"data": [{"prompt": "Q", "completion": "A"}]}, "under the key data"),
        ({"version": 1, "data": [{"prompt": "Q"}]}, "under the key data"),
        ({"question": "Q?", "answer": "A"}, "--data.fields.prompt question --data.fields.completion answer"),
        ({"frage": "Q?", "antwort": "A"}, "--data.fields.prompt frage --data.fields.completion antwort"),
        ({"messages": [{"message": "hi"}, {"message": "ho"}]}, "none of them gives the speaker"),
        ({"dialog": [{"speaker": "user", "text": "hi"}]},
         "--data.fields.messages dialog --data.fields.role speaker --data.fields.content text"),
        ({"message_tree_id": 1, "prompt": {"text": "x", "role": "prompter", "replies": []}}, "message tree"),
        ({"id": "1", "question": [[{"role": "user", "content": "x"}]], "function": []}, "questions without answers"),
        ({"id": "1", "ground_truth": []}, "answers without questions"),
        ({"title": "t", "paragraphs": ["a", "b"]}, "--data.format text --data.fields.text paragraphs"),
        ({"instruction": "I", "instances": [{"input": "", "output": "o"}]}, "--data.fields.output instances.0.output"),
        (user_assistant("A", images=["1.jpg"]), "images"),
        (["a"], "list"),
    ],
)  # fmt: skip
def test_unknown_rows_name_keys_formats_and_the_mapping_that_helps(row: Any, words: str) -> None:
    with pytest.raises(UnknownFormat) as refusal:
        parse_row(row, "auto", FieldsSection())
    assert words in refusal.value.reason
    kinds = {list: "row-not-object", dict: "media-not-supported" if "images" in row else "unknown-format"}
    assert refusal.value.code == kinds[type(row)]
    if isinstance(row, dict) and "images" not in row:
        assert "Keys found: " in refusal.value.reason
        assert "Formats known: " in refusal.value.reason


def test_an_answer_that_is_a_json_list_is_an_answer() -> None:
    row = {"prompt": "Primes below six, as JSON?", "completion": "[2, 3, 5]"}
    assert turns(row) == [("user", "Primes below six, as JSON?"), ("assistant", "[2, 3, 5]")]
