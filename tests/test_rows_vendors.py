"""Rows in each vendor's format, turn by turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from test_formats import SAME_TURNS, parse, turns, user_assistant
from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.conversation import NOTE_UNANSWERED, Conversation, RawText, RowRefused, Segments
from tunesmith.rows.exports import NOTE_BRANCHES, NOTE_INSTRUCTIONS
from tunesmith.rows.formats import parse_row
from tunesmith.rows.pairs import NOTE_JSON_ANSWER, NOTE_JSON_QUESTION
from tunesmith.rows.parts import NOTE_TEXT_AFTER_CALL
from tunesmith.rows.textmarks import (
    NOTE_BRACES,
    NOTE_TRANSCRIPT_QUESTION,
    NOTE_TRANSCRIPT_REPLY,
    NOTE_TRANSCRIPT_TEXT,
)

CALL = {"name": "weather", "arguments": {"city": "Rome"}}
MADE_CALL = {"type": "function", "function": CALL}
ASK = {"role": "user", "content": "Rain?"}


def reply(**turn: Any) -> Any:
    return parse({"messages": [ASK, {"role": "assistant", **turn}]}).messages[-1]


def refusal_of(row: Any, **fields: str) -> RowRefused:
    with pytest.raises(RowRefused) as refusal:
        parse_row(row, "auto", FieldsSection(**fields))
    return refusal.value


def code_of(row: Any, **fields: str) -> str:
    return refusal_of(row, **fields).code


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content", "thought"])
def test_reasoning_has_many_names(key: str) -> None:
    assert reply(content="No.", **{key: "Hm"}).reasoning_content == "Hm"
    assert reply(**({"content": "No.", "reasoning_content": ""} | {key: "Hm"})).reasoning_content == "Hm"
    differ = {"role": "assistant", "content": "A", "thinking": "one", "reasoning": "two"}
    assert code_of({"messages": [ASK, differ]}) == "reasoning-differs"
    assert code_of({"messages": [{**ASK, key: "Hm"}, *SAME_TURNS[1:]]}) == "call-outside-reply"


@pytest.mark.parametrize("key", ["loss", "loss_weight", "weight", "train", "training", "trainable"])
@pytest.mark.parametrize("value", [False, 0, 0.0, True, 1])
def test_flags_of_turns_say_what_is_trained(key: str, value: Any) -> None:
    chat = parse({"messages": [ASK, {"role": "assistant", "content": "a", key: value}, ASK, SAME_TURNS[2]]})
    assert chat.messages[1].is_trained is bool(value)
    assert chat.notes == ()


def test_flags_that_differ_refuse_the_row() -> None:
    turn = {"role": "assistant", "content": "A", "loss": True, "weight": 0}
    refusal = refusal_of({"messages": [ASK, turn]})
    assert refusal.code == "flags-differ"
    assert "loss" in refusal.reason
    assert "weight" in refusal.reason


def detail(*spans: tuple[Any, Any, Any]) -> list[dict[str, Any]]:
    return [{"begin_offset": begin, "end_offset": end, "train": train} for begin, end, train in spans]


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_train_detail_becomes_spans_of_context(key: str) -> None:
    turn = reply(content="Hello, world", **{key: detail((0, 4, False), (5, 6, False), (7, 8, True), (11, 11, False))})
    assert turn.context_spans == ((0, 7), (11, 12))
    assert [turn.content[begin:end] for begin, end in turn.context_spans] == ["Hello, ", "d"]


@pytest.mark.parametrize(
    ("spans", "code"),
    [
        ([(0, 12, False)], "details-out-of-range"),
        ([(-1, 3, False)], "details-out-of-range"),
        ([(5, 3, False)], "details-out-of-range"),
        ([(0, 4, False), (4, 6, True)], "details-overlap"),
        ([(0.5, 4, False)], "details-malformed"),
        ([(0, 4, 1)], "details-malformed"),
        ([(0, 11, False)], "nothing-to-train"),
    ],
)
def test_bad_train_details_refuse_the_row(spans: list[Any], code: str) -> None:
    turn = {"role": "assistant", "content": "Hello, world", "train_detail": detail(*spans)}
    assert code_of({"messages": [ASK, turn]}) == code


def test_openai_function_call_beside_a_content() -> None:
    turn = reply(content="I look", function_call={"name": "weather", "arguments": '{"city": "Rome", "until": null}'})
    assert turn.content == "I look"
    assert turn.tool_calls[0]["function"]["arguments"] == '{"city": "Rome", "until": null}'  # as in the row


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": 1.0}', '{"a": 1.0}'),
        ({"a": None}, {"a": None}),
        ("now", "now"),
        ("", {}),
        (None, {}),
        ('["a"]', '["a"]'),
    ],
)
def test_arguments_stay_as_the_row_has_them(arguments: Any, kept: Any) -> None:
    turn = reply(content="", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": arguments}}])
    assert turn.tool_calls == ({"id": "1", "type": "function", "function": {"name": "f", "arguments": kept}},)


def test_broken_json_arguments_refuse_the_row() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]}
    assert code_of({"messages": [ASK, turn]}) == "not-json"


def test_ids_of_calls_and_results_are_kept() -> None:
    call = {"id": "c7", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    chat = parse({"messages": [
        ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c7", "content": "sunny"}, {"role": "assistant", "content": "No"},
    ]})  # fmt: skip
    assert chat.messages[1].tool_calls == (call,)
    assert chat.messages[2].tool_call_id == "c7"


def test_anthropic_tool_use_and_results() -> None:
    chat = parse({"system": "S", "messages": [
        ASK,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "abc"}, {"type": "text", "text": "I look"},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}], "is_error": False},
            {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "No"},
    ], "tools": [{"name": "weather", "input_schema": {"type": "object"}}]})  # fmt: skip
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool", "user", "assistant"]
    asked = chat.messages[2]
    assert (asked.reasoning_content, asked.content) == ("Hm", "I look")
    assert asked.tool_calls == ({"id": "t1", **MADE_CALL},)
    assert (chat.messages[3].content, chat.messages[3].tool_call_id) == ("sunny", "t1")
    schema = {"name": "weather", "parameters": {"type": "object"}}
    assert chat.tools == ({"type": "function", "function": schema},)


def test_gemini_parts() -> None:
    chat = parse({"system_instruction": {"parts": [{"text": "S"}]}, "contents": [
        {"role": "user", "parts": [{"text": "Rain?"}]},
        {"role": "model", "parts": [{"text": "Hm", "thought": True}, {"functionCall": {"name": "weather", "args": CALL["arguments"]}}]},
        {"role": "function", "parts": [{"functionResponse": {"name": "weather", "response": {"sky": "blue"}}}]},
        {"role": "model", "parts": [{"text": "No"}]},
    ]})  # fmt: skip
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[2].tool_calls == (MADE_CALL,)
    assert chat.messages[2].reasoning_content == "Hm"
    assert (chat.messages[3].name, chat.messages[3].content) == ("weather", '{"sky": "blue"}')
    picture = {"role": "user", "parts": [{"inlineData": {"data": "x"}}]}
    assert code_of({"contents": [picture]}) == "media-not-supported"


def test_calls_in_turns_of_their_own_are_one_reply() -> None:
    call = {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    answer = {"role": "tool_response", "content": "sunny"}
    chat = parse({"messages": [ASK, call, call, answer, answer, {"role": "assistant", "content": "No"}]})
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[1].tool_calls == (MADE_CALL, MADE_CALL)


def test_text_behind_a_call_is_noted() -> None:
    parts = [{"type": "tool_use", "name": "weather", "input": {"city": "Rome"}}, {"type": "text", "text": "Wait"}]
    assert parse({"messages": [ASK, {"role": "assistant", "content": parts}]}).notes == (NOTE_TEXT_AFTER_CALL,)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("redacted_thinking", "redacted-thinking"),
        ("image", "media-not-supported"),
        ("input_audio", "media-not-supported"),
        ("wizardry", "unknown-part-type"),
    ],
)
def test_parts_without_text_refuse_the_row(kind: str, code: str) -> None:
    refusal = refusal_of({"messages": [{"role": "user", "content": [{"type": kind}]}, SAME_TURNS[2]]})
    assert refusal.code == code
    assert kind.split("_")[0] in refusal.reason


def test_parts_that_arrow_filled_with_nulls() -> None:
    parts = [{"type": "text", "text": "Q", "image": None}, {"text": "?", "type": None}]
    assert turns({"messages": [{"role": "user", "content": parts}, SAME_TURNS[2]]})[0] == ("user", "Q?")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_the_system_prompt_has_many_names(name: str) -> None:
    expected = [("system", "S"), ("user", "Q"), ("assistant", "A")]
    pairs = [{"input": "Q", "output": "A"}]
    for row in ({"messages": SAME_TURNS[1:]}, {"prompt": "Q", "completion": "A"}, {"instruction": "Q", "output": "A"},
                {"query": "Q", "response": "A"}, {"conversation": pairs}, {"messages": SAME_TURNS}):  # fmt: skip
        assert turns({**row, name: "S"}) == expected
    assert code_of({"messages": SAME_TURNS, name: "T"}) == "system-prompt-differs"


def test_two_system_prompts_that_differ_refuse_the_row() -> None:
    row = {"prompt": "Q", "completion": "A", "system": "S", "system_prompt": "T"}
    assert code_of(row) == "system-prompt-differs"
    assert turns({**row, "system_prompt": "S"})[0] == ("system", "S")


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"]],
        '[["a", "b"]]',
        [{"question": "a", "answer": "b"}],
        [{"user": "a", "assistant": "b"}],
        [{"human": "a", "response": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ],
)
def test_history_in_every_form_goes_before_the_question(history: Any) -> None:
    expected = [("user", "a"), ("assistant", "b"), ("user", "Q"), ("assistant", "A")]
    assert turns({"query": "Q", "response": "A", "history": history}) == expected
    assert turns({"instruction": "Q", "output": "A", "history": history}) == expected
    assert turns({"q": "Q", "a": "A", "h": history}, prompt="q", completion="a", history="h") == expected


def test_mapped_instruction_input_and_reasoning_of_a_question() -> None:
    row = {"todo": "Answer", "q": "When?", "facts": ["In 1912", "In Rome"], "why": "It says so", "a": "1912"}
    chat = parse(
        row, "prompt_completion", instruction="todo", prompt="q", input="facts", reasoning="why", completion="a"
    )
    assert [m.content for m in chat.messages] == ["Answer\nWhen?\nIn 1912\nIn Rome", "1912"]
    assert chat.messages[1].reasoning_content == "It says so"


def test_reasoning_columns_of_medical_o1() -> None:
    chat = parse({"Question": "Q", "Complex_CoT": "Hm", "Response": "A"})
    assert [(m.content, m.reasoning_content) for m in chat.messages] == [("Q", None), ("A", "Hm")]


def test_xlam_answers_are_calls() -> None:
    schema = {"name": "weather", "parameters": {"city": {"type": "str"}}}
    row = {"id": 1, "query": "Rain?", "tools": [schema], "answers": [CALL, CALL]}
    assert parse(row).messages[1].tool_calls == (MADE_CALL, MADE_CALL)
    assert parse(row).tools == ({"type": "function", "function": schema},)


def test_other_rows_of_pairs() -> None:
    assert turns({"kind": "x", "input": "Q", "target": "A"}) == [("user", "Q"), ("assistant", "A")]
    assert turns({"conversation": [{"human": "Q", "assistant": "A"}]}) == [("user", "Q"), ("assistant", "A")]
    assert turns({"conversation": SAME_TURNS}) == turns({"messages": SAME_TURNS})
    assert turns(SAME_TURNS) == turns({"messages": SAME_TURNS})  # a row that is a list of turns
    lima = parse({"conversations": ["Q", "A", "more?"], "source": "x"})
    assert [(m.role, m.content) for m in lima.messages] == [("user", "Q"), ("assistant", "A")]
    assert lima.notes == (NOTE_UNANSWERED,)
    untrained = [{"input": "a", "output": "b", "output_with_loss": False}, {"input": "Q", "output": "A"}]
    assert [m.is_trained for m in parse({"conversation": untrained}).messages[1::2]] == [False, True]


def test_a_prompt_that_ends_in_the_assistants_turn_begins_the_reply() -> None:
    prompt = [{"role": "user", "content": "Poem?"}, {"role": "assistant", "content": "Roses"}]
    for completion in (" are red", [{"role": "assistant", "content": " are red"}]):
        chat = parse({"prompt": prompt, "completion": completion})
        assert [(m.content, m.context_spans) for m in chat.messages] == [("Poem?", ()), ("Roses are red", ((0, 5),))]
        assert chat.messages[1].is_trained


def test_columns_of_turns() -> None:
    items = [{"role": "user", "content": "Q"}, {"type": "function_call", "call_id": "c", **CALL}]
    items += [{"type": "function_call_output", "call_id": "c", "output": "sunny"}]
    chat = parse(
        {"input": items, "output": [{"role": "assistant", "content": [{"type": "output_text", "text": "No"}]}]}
    )
    assert [(m.role, m.content, m.is_trained) for m in chat.messages] == [
        ("user", "Q", False), ("assistant", "", False), ("tool", "sunny", False), ("assistant", "No", True)]  # fmt: skip
    carries_tools = {"role": "assistant", "content": "A", "tools": [{"name": "t"}]}
    assert code_of({"prompt": "Q", "completion": [carries_tools]}) == "tools-in-turns"
    assert code_of({"query": "Q", "response": "A", "history": [carries_tools]}) == "tools-in-turns"


def test_variables_and_documents_of_a_row() -> None:
    row = {"messages": SAME_TURNS, "chat_template_kwargs": {"enable_thinking": False}, "documents": '[{"text": "D"}]'}
    chat = parse(row)
    assert (chat.template_kwargs, chat.documents, chat.notes) == ({"enable_thinking": False}, ({"text": "D"},), ())
    assert code_of({**row, "chat_template_kwargs": [1]}) == "template-kwargs-not-object"


def test_json_text_is_text() -> None:
    answer = '[{"role": "assistant", "content": "Hi."}]'
    for text in (answer, '[{"entity": "Rome"}]', "[1, 2]", '{"a": 1}'):
        assert turns({"prompt": "Q", "completion": text}) == [("user", "Q"), ("assistant", text)]
    assert parse({"prompt": "Q", "completion": answer}).notes == (NOTE_JSON_ANSWER,)
    assert parse({"prompt": answer, "completion": "A"}).notes == (NOTE_JSON_QUESTION,)


def test_hh_rlhf_transcripts_are_turns_where_mapped() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\nc\n\nHuman: d\n\nAssistant: e"
    chat = turns({"chosen": text, "rejected": "x"}, messages="chosen")
    assert chat == [("user", "a"), ("assistant", "b\nc"), ("user", "d"), ("assistant", "e")]


@pytest.mark.parametrize("text", [" <user>: Hi <bot>: Hello <user>: So?", "Human: a\nAssistant: b", "User: a\n\nAI: b"])
def test_transcripts_inside_a_text_are_noted(text: str) -> None:
    assert parse({"instruction": text, "output": "A"}).notes == (NOTE_TRANSCRIPT_QUESTION,)
    assert parse({"instruction": "Q", "output": text}).notes == (NOTE_TRANSCRIPT_REPLY,)
    assert parse_row({"text": text}, "auto", FieldsSection()) == RawText(text, (NOTE_TRANSCRIPT_TEXT,))


def test_latex_and_vue_are_no_placeholders() -> None:
    assert parse(user_assistant("The root of {{a}} is $x^{{b}}$")).notes == ()
    assert parse(user_assistant("<p>{{message}}</p>")).notes == (NOTE_BRACES,)
    for name in ("name", "AUTHOR", "user", "char", "company"):
        refusal = refusal_of(user_assistant(f"I am {{{{{name}}}}}."))
        assert refusal.code == "placeholder-in-reply"
        assert f"{{{{{name}}}}}" in refusal.reason


def test_segments_are_kept_in_their_pieces() -> None:
    row = {"segments": [{"label": False, "text": "<s>Q"}, {"label": True, "text": "A</s>"}]}
    assert parse_row(row, "auto", FieldsSection()) == Segments((("<s>Q", False), ("A</s>", True)))
    assert code_of({"segments": [{"label": False, "text": "Q"}]}) == "nothing-to-train"


def node(name: str, parent: str | None, role: str, **content: Any) -> dict[str, Any]:
    body = {"content_type": "text", "parts": [name], **content}
    return {name: {"id": name, "parent": parent, "children": [],
                   "message": {"author": {"role": role}, "content": body, "recipient": "all", "metadata": {}}}}  # fmt: skip


def test_chatgpts_export_is_the_branch_last_seen() -> None:
    mapping = {"root": {"id": "root", "message": None, "parent": None, "children": ["s"]}}
    mapping |= node("s", "root", "system", parts=[""]) | node("me", "s", "user", content_type="user_editable_context")
    mapping |= node("Q", "me", "user") | node("A1", "Q", "assistant") | node("A2", "Q", "assistant")
    chat = parse({"title": "T", "mapping": mapping, "current_node": "A2", "create_time": 1.5})
    assert [(m.role, m.content) for m in chat.messages] == [("user", "Q"), ("assistant", "A2")]
    assert chat.notes == (NOTE_BRANCHES, NOTE_INSTRUCTIONS)
    picture = node("Q", None, "user", content_type="multimodal_text", parts=[{"asset_pointer": "x"}])
    refusal = refusal_of({"mapping": picture, "current_node": "Q"})
    assert refusal.code == "media-not-supported"
    assert "multimodal_text" in refusal.reason


@pytest.mark.parametrize(
    ("role", "stands_for"),
    [("prompter", "user"), ("AI", "assistant"), ("Chatbot", "assistant"), ("function-response", "tool"), ("bing", "assistant")],
)  # fmt: skip
def test_roles_of_more_vendors(role: str, stands_for: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": role, "value": "R"}, {"from": "gpt", "value": "A"}]
    parsed = parse_row({"conversations": turns}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1].role == stands_for


def test_a_role_with_a_hyphen_is_a_call() -> None:
    call = {"from": "function-call", "value": '{"name": "f", "arguments": {}}'}
    parsed = parse_row({"conversations": [{"from": "human", "value": "Q"}, call]}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1].tool_calls[0]["function"]["name"] == "f"


def test_types_of_langchain_are_roles() -> None:
    turns = [{"type": "system", "content": "S"}, {"type": "human", "content": "Q"}, {"type": "ai", "content": "A"}]
    parsed = parse_row({"messages": turns}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert [m.role for m in parsed.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "value", ["on", "off", True, "high", {"effort": "high"}, {"type": "enabled", "budget_tokens": 9}]
)
def test_a_switch_of_reasoning_is_no_thought(value: object) -> None:
    """NVIDIA's Nemotron data say "reasoning": "on"."""
    parsed = parse_row({"input": "Q", "output": "A", "reasoning": value}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[-1].reasoning_content is None
    assert any("a setting" in note for note in parsed.notes)


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation"])
def test_pairs_are_read_under_every_name(name: str) -> None:
    """COIG has pairs of question and answer under conversations."""
    parsed = parse_row({name: [{"question": "Q", "answer": "A"}]}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert [m.content for m in parsed.messages] == ["Q", "A"]


def test_a_transcript_with_headings_is_named() -> None:
    parsed = parse_row({"text": "### Human: Can you write?### Assistant: Yes."}, "auto", FieldsSection())
    assert any("transcript" in note for note in parsed.notes)


@pytest.mark.parametrize("content", [{"sky": "blue"}, [{"sky": "blue"}], [{"sky": "blue"}, {"sky": "red"}]])
def test_an_object_that_a_tool_answered_is_json(content: object) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [
        {"role": "user", "content": "Q"},
        call,
        {"role": "tool", "content": content},
        {"role": "assistant", "content": "A"},
    ]
    parsed = parse_row({"messages": turns}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[2].content == json.dumps(content)


def test_thoughts_are_reasoning() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "thoughts": "Think"}]
    parsed = parse_row({"messages": turns}, "auto", FieldsSection())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1].reasoning_content == "Think"
