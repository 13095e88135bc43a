"""From rows of any format to questions for a model, and back to rows that train reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tunesmith.config.data_keys import DataSection, FieldsSection
from tunesmith.generation.reply_parts import ReplyParts
from tunesmith.rows.conversation import Conversation, Message, RowRefused
from tunesmith.rows.formats import NO_REPLY, detect_format, parse_document
from tunesmith.rows.keys import find_column

Row = dict[str, Any]
_REPLY_COLUMNS = {
    "prompt_completion": ("prompt", ("completion",)),
    "alpaca": ("instruction", ("output", "response")),
    "query_response": ("query", ("response", "Response")),
    "input_output": ("input", ("output", "target")),
}
"""Formats with the reply in a column of its own: the column of the question, and those of the reply."""
_STAND_IN = Message("assistant", "OK")  # a reply that every template takes, where only the prompt is wanted


@dataclass(frozen=True, slots=True)
class Question:
    """The turns before a reply, as a row that train reads.

    Attributes:
        where: FILE:ROW of the row that it comes from.
        turn: which of the row's replies it asks for, from 0.
        row: messages up to the reply, tools and what else the template reads. Earlier replies are not trained.
        prefill: beginning of the reply that the row gives.
        reference: the row's own reply as a message; None where it has none.
    """

    where: str
    turn: int
    row: Row
    prefill: str = ""
    reference: Row | None = None

    def prompt_row(self) -> Row:
        """The row with a reply that stands in, for the tokens of its prompt."""
        content = self.prefill + _STAND_IN.content
        return self.answered(spell_message(replace(_STAND_IN, content=content, context_spans=_span_of(self.prefill))))

    def answered(self, message: Row) -> Row:
        return {**self.row, "messages": [*self.row["messages"], message]}

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> Question:
        return cls(**json.loads(line))


def read_questions(where: str, value: Any, data: DataSection, replies: Literal["last", "all"]) -> list[Question]:
    """The questions of a row: to its last reply, or to all of them. A row that ends with a question needs no reply.

    Args:
        value: the row as in the file.

    Raises:
        RowRefused, UnknownFormat: the row cannot be read, as in training.
    """
    if isinstance(value, Mapping):
        value = complete_row(value, data.format, data.fields)
    parsed, _ = parse_document(value, data.format, data.fields, data.ignore_columns, to_answer=True)
    if not isinstance(parsed, Conversation):
        raise RowRefused("is text without a question to answer", by_choice=True, code="no-question")
    trained = [place for place, message in enumerate(parsed.messages) if message.role == "assistant"]
    trained = [place for place in trained if parsed.messages[place].is_trained]
    numbered = list(enumerate(trained))
    return [_question(where, turn, parsed, place) for turn, place in (numbered if replies == "all" else numbered[-1:])]


def complete_row(row: Mapping[str, Any], format_name: str, fields: FieldsSection) -> Mapping[str, Any]:
    """The row with its reply column, where that is missing or null: rows to be answered may have none."""
    name = detect_format(row, fields) if format_name == "auto" else format_name
    found = next((n for n, (asked, _) in _REPLY_COLUMNS.items() if asked in row), None) if name is None else name
    if found not in _REPLY_COLUMNS or "chosen" in row or "rejected" in row:  # preference data has its own advice
        return row
    mapped = fields.completion or fields.output
    columns = (mapped,) if mapped else _REPLY_COLUMNS[found][1]
    if any(find_column(row, column)[1] is not None for column in columns):
        return row
    return {**row, columns[0]: ""}


def _question(where: str, turn: int, parsed: Conversation, place: int) -> Question:
    reply = parsed.messages[place]
    spans = reply.context_spans[:1] if reply.context_spans and reply.context_spans[0][0] == 0 else ()
    prefill = reply.content[: spans[0][1]] if spans else ""
    has_reference = not reply.content[len(prefill) :].startswith(NO_REPLY)
    reference = spell_message(replace(reply, context_spans=spans)) if has_reference else None
    before = [replace(message, is_trained=False, context_spans=()) for message in parsed.messages[:place]]
    return Question(where, turn, _spell_row(before, parsed), prefill, reference)


def _spell_row(messages: Sequence[Message], source: Conversation) -> Row:
    row: Row = {"messages": [spell_message(message) for message in messages]}
    others = {
        "tools": list(source.tools),
        "documents": list(source.documents),
        "chat_template_kwargs": dict(source.template_kwargs),
    }
    return row | {name: value for name, value in others.items() if value}


def spell_message(message: Message) -> Row:
    """The message as a turn of a row; read again it is the same message."""
    turn = message.to_template()
    if message.role == "assistant" and not message.is_trained:
        turn["loss_weight"] = 0
    if message.context_spans:
        turn["train_detail"] = [
            {"begin_offset": start, "end_offset": end - 1, "train": False} for start, end in message.context_spans
        ]
    return turn


def _span_of(prefill: str) -> tuple[tuple[int, int], ...]:
    return ((0, len(prefill)),) if prefill else ()


def answer_message(question: Question, parts: ReplyParts) -> Row:
    """A reply of the model as a turn of a row: reasoning and tool calls in fields of their own."""
    calls = tuple(
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parts.tool_calls
    )
    content, prefill = question.prefill + parts.content, question.prefill
    return spell_message(
        Message("assistant", content, parts.reasoning or None, calls, context_spans=_span_of(prefill))
    )  # fmt: skip


def add_system(question: Question, system: str | None) -> Question:
    """The question with a system prompt, where it has none of its own."""
    messages = question.row["messages"]
    if not system or (messages and messages[0]["role"] == "system"):
        return question
    turn = {"role": "system", "content": system}
    return replace(question, row={**question.row, "messages": [turn, *messages]})
