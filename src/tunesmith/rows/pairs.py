"""Parse rows with a question and its answer in separate columns: prompt_completion, alpaca and similar formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.columns import (
    Draft,
    finish_draft,
    is_json_of_turns,
    read_column,
    read_past,
    read_thoughts,
)
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.rows.keys import Keys
from tunesmith.rows.tools import parse_tool_calls
from tunesmith.rows.turns import is_lines, parse_turns
from tunesmith.rows.values import as_text, parse_json

NOTE_JSON_QUESTION = "has a question that is JSON text of turns; it is used as text"
NOTE_JSON_ANSWER = "has an answer that is JSON text of turns; it is trained as text"


def parse_prompt_completion(keys: Keys, fields: FieldsSection) -> Draft:
    """{"prompt", "completion"}, each a string or a list of messages; with mapped instruction, input and history."""
    prompt_name, prompt = read_column(keys, fields.prompt, ("prompt",))
    answer_name, completion = read_column(keys, fields.completion or fields.output, ("completion",))
    for name, value in ((prompt_name, prompt), (answer_name, completion)):
        if value is None:
            raise _absent(name, keys)
    if isinstance(prompt, list):
        return _after_turns(keys, fields, prompt, _read_answer(keys, fields, completion, answer_name))
    parts = [_mapped_text(keys, fields.instruction), as_text(prompt, prompt_name), _mapped_text(keys, fields.input)]
    return _ask(keys, fields, parts, _read_answer(keys, fields, completion, answer_name))


def parse_alpaca(keys: Keys, fields: FieldsSection) -> Draft:
    """{"instruction", "input" and Dolly's "context", "output" or "response", "system", "history"}."""
    return _parse_columns(keys, fields, ("instruction",), ("input", "context"), ("output", "response"))


def parse_query_response(keys: Keys, fields: FieldsSection) -> Draft:
    """ms-swift's {"query", "response", "history"}; {"Question", "Complex_CoT", "Response"} of medical-o1."""
    return _parse_columns(keys, fields, ("query", "Question"), (), ("response", "Response"))


def parse_input_output(keys: Keys, fields: FieldsSection) -> Draft:
    """{"input", "output"}, and firefly's {"kind", "input", "target"}."""
    return _parse_columns(keys, fields, ("input",), ("context",), ("output", "target"))


def parse_xlam(keys: Keys, fields: FieldsSection) -> Draft:
    """{"query", "answers", "tools"}: the answer is a JSON text of tool calls."""
    question_name, question = read_column(keys, fields.prompt, ("query",))
    answer_name, answers = read_column(keys, fields.completion, ("answers",))
    calls = parse_json(answers, answer_name)
    if not isinstance(calls, list):
        raise RowRefused(
            f"{answer_name} is not a list of tool calls. Correct it, or remove the row", code="calls-not-list"
        )
    reply = Message("assistant", "", read_thoughts(keys, fields), parse_tool_calls(calls, keys.reading))
    return _ask(keys, fields, [as_text(question, question_name), _mapped_text(keys, fields.input)], [reply])


def _parse_columns(
    keys: Keys, fields: FieldsSection, asked: Sequence[str], extra: Sequence[str], answered: Sequence[str]
) -> Draft:
    answer_name, answer = read_column(keys, fields.output or fields.completion, answered)
    if answer is None:
        raise _absent(answer_name, keys)
    question_name, question = read_column(keys, fields.instruction or fields.prompt, asked)
    if not _are_turns(answer):
        answer = as_text(answer, answer_name)
    replies = _read_answer(keys, fields, answer, answer_name)
    if _are_turns(question):
        return _after_turns(keys, fields, question, replies)
    parts = [as_text(question, question_name)]
    if fields.input:
        parts.append(_mapped_text(keys, fields.input))
    else:
        parts += [as_text(keys.get(name), name) for name in extra if name in keys.values]
    return _ask(keys, fields, parts, replies)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _absent(name: str, keys: Keys) -> RowRefused:
    return RowRefused(
        f"column {name} is missing or null (keys found: {', '.join(map(str, keys.values))})", code="column-missing"
    )


def _mapped_text(keys: Keys, column: str | None) -> str:
    if not column:
        return ""
    value = keys.find(column)[1]
    if is_lines(value):
        value = "\n".join(value)  # passages
    return as_text(value, column)


def _ask(keys: Keys, fields: FieldsSection, parts: Sequence[str], replies: list[Message]) -> Draft:
    """The chat: earlier turns, the question (parts joined by line breaks), the reply."""
    kept = [part for part in parts if part.strip()]
    question = "\n".join(kept) if kept else next(iter(parts), "")
    _note_json(keys, question, NOTE_JSON_QUESTION)
    return finish_draft(keys, fields, [*read_past(keys, fields), Message("user", question), *replies])


def _note_json(keys: Keys, text: Any, note: str) -> None:
    if isinstance(text, str) and is_json_of_turns(text):
        keys.reading.note(note)


def _read_answer(keys: Keys, fields: FieldsSection, value: Any, name: str) -> list[Message]:
    """The reply: a text, one turn, or a list of turns, with the reasoning from its column."""
    if isinstance(value, (list, Mapping)):
        turns = value if isinstance(value, list) else [value]
        messages, tools = parse_turns(turns, keys.reading, fields.role, fields.content)
        if tools:
            raise RowRefused(f"{name} contains tools; put them into a column tools", code="tools-in-turns")
    else:
        messages = [Message("assistant", as_text(value, name))]
        _note_json(keys, value, NOTE_JSON_ANSWER)
    thoughts = read_thoughts(keys, fields)
    if not thoughts:
        return messages
    first = next((i for i, m in enumerate(messages) if m.role == "assistant"), None)
    said = messages[first].reasoning_content if first is not None else None
    if first is None or (said and said.strip() != thoughts.strip()):
        raise RowRefused(
            "the reasoning in a column differs from the reasoning in the reply; keep one of them",
            code="reasoning-differs",
        )
    messages[first] = replace(messages[first], reasoning_content=thoughts)
    return messages


def _after_turns(keys: Keys, fields: FieldsSection, prompt: list[Any], replies: list[Message]) -> Draft:
    """A prompt of turns (context) and the completion."""
    for part in ("instruction", "input"):
        if column := getattr(fields, part):
            raise RowRefused(
                f"data.fields.{part} {column} cannot be joined to a prompt that is a list of messages",
                code="column-not-joinable",
            )
    turns, tools = parse_turns(prompt, keys.reading, fields.role, fields.content)
    turns = [replace(turn, is_trained=False, context_spans=()) for turn in turns]
    if turns[-1].role == "assistant" and replies and replies[0].role == "assistant" and not turns[-1].tool_calls:
        replies = [_with_prefill(turns.pop(), replies[0]), *replies[1:]]
    past = read_past(keys, fields)
    has_system = bool(turns) and turns[0].role == "system"
    messages = [*turns[:1], *past, *turns[1:]] if has_system else [*past, *turns]
    return finish_draft(keys, fields, [*messages, *replies], tools)


def _with_prefill(prefill: Message, reply: Message) -> Message:
    """Join a prompt that ends inside the reply: one turn whose beginning is context."""
    if prefill.reasoning_content or reply.reasoning_content:
        raise RowRefused(
            "the prompt ends with an assistant turn that has reasoning; write the whole reply as the completion",
            code="reasoning-in-prefill",
        )
    length = len(prefill.content)
    if not length:
        return reply
    spans = [(begin + length, end + length) for begin, end in reply.context_spans]
    if spans and spans[0][0] == length:
        spans[0] = (0, spans[0][1])
    else:
        spans.insert(0, (0, length))
    return replace(
        reply, content=prefill.content + reply.content, context_spans=tuple(spans), name=reply.name or prefill.name
    )
