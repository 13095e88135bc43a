"""Parse one row into a Conversation, RawText or Segments, detecting its format from its keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.advice import explain_lost_columns
from tunesmith.rows.chats import (
    TURNS_NAMES,
    are_pairs,
    parse_messages,
    parse_segments,
    parse_text,
    parse_xtuner,
)
from tunesmith.rows.columns import Draft
from tunesmith.rows.conversation import (
    NOTE_EMPTY_CONTEXT,
    NOTE_EMPTY_QUESTION,
    NOTE_UNANSWERED,
    Conversation,
    Message,
    Parsed,
    RawText,
    RowRefused,
    Segments,
    UnknownFormat,
    find_lone_surrogate,
)
from tunesmith.rows.exports import parse_chatgpt_export
from tunesmith.rows.hints import (
    FORMATS_KNOWN,
    chosen_side_hint,
    describe_unknown,
    list_keys,
    lone_turn_hint,
    rejected_label_hint,
)
from tunesmith.rows.keys import ROW, Keys, LostColumns, Reading, find_column
from tunesmith.rows.pairs import (
    parse_alpaca,
    parse_input_output,
    parse_prompt_completion,
    parse_query_response,
    parse_xlam,
)
from tunesmith.rows.textmarks import (
    NOTE_BRACES,
    NOTE_TRANSCRIPT_QUESTION,
    NOTE_TRANSCRIPT_REPLY,
    NOTE_TRANSCRIPT_TEXT,
    find_placeholder,
    has_braces,
    is_transcript,
)
from tunesmith.rows.turns import ROLE_KEYS
from tunesmith.rows.values import is_missing, json_type, show
from tunesmith.sources.jsontext import parse_json_list
from tunesmith.sources.textfile import LongText, find_long_text

Row = Mapping[str, Any]
Parser = Callable[[Keys, FieldsSection], Draft | RawText | Segments]

FORMATS: dict[str, Parser] = {
    "messages": parse_messages,
    "sharegpt": parse_messages,  # the turn shows whether it has role/content or from/value
    "prompt_completion": parse_prompt_completion,
    "alpaca": parse_alpaca,
    "query_response": parse_query_response,
    "input_output": parse_input_output,
    "xtuner": parse_xtuner,
    "xlam": parse_xlam,
    "chatgpt_export": parse_chatgpt_export,
    "segments": parse_segments,
    "text": parse_text,
}
MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")


def detect_format(row: Row, fields: FieldsSection) -> str | None:
    """Name of the format, from the mapped columns or else from the keys of the row; None if unknown."""
    if fields.prompt or fields.completion:
        return "prompt_completion"
    if fields.messages:
        turns = parse_json_list(find_column(row, fields.messages)[1])
        return "xtuner" if are_pairs(turns) else "messages"
    if fields.text:
        return "text"
    if fields.output or (fields.instruction and not ("prompt" in row and "completion" in row)):
        return "alpaca"
    name, turns = _find_turns(row)
    if turns:
        return _detect_turns(turns, fields)
    return _detect_columns(row) or ("messages" if name else None)


def _find_turns(row: Row) -> tuple[str, list[Any]]:
    """The first column with a list of turns, preferring a list that is not empty; ("", []) for none."""
    empty = ""
    for name in TURNS_NAMES:
        if name in row and isinstance(turns := parse_json_list(row[name]), list):
            if turns:
                return name, turns
            empty = empty or name
    return empty, []


def _detect_turns(turns: list[Any], fields: FieldsSection) -> str | None:
    if turns and all(isinstance(turn, str) for turn in turns):
        return "messages"  # LIMA
    keys = (fields.role,) if fields.role else (*ROLE_KEYS, "type")
    if all(isinstance(turn, Mapping) and any(key in turn for key in keys) for turn in turns):
        return "messages"
    return "xtuner" if are_pairs(turns) else None


def _detect_columns(row: Row) -> str | None:
    """Format by the names of the columns, the most specific first."""
    for name, columns in (
        ("alpaca", ("instruction", "output")),
        ("alpaca", ("instruction", "response")),
        ("prompt_completion", ("prompt", "completion")),
        ("xlam", ("query", "answers", "tools")),
        ("query_response", ("query", "response")),
        ("query_response", ("Question", "Response")),
    ):
        if all(column in row for column in columns):
            return name
    if "input" in row and "instruction" not in row and ("output" in row or "target" in row):
        return "input_output"
    if isinstance(row.get("mapping"), Mapping) and "current_node" in row:
        return "chatgpt_export"
    if isinstance(parse_json_list(row.get("segments")), list):
        return "segments"
    has_pair = "question" in row and ("answer" in row or "response" in row)  # then the text is context
    return "text" if isinstance(row.get("text"), str) and not has_pair else None


NO_REPLY = "\ufdd1"  # a noncharacter: stands for the reply of a row that is to be answered and has none


def parse_row(
    row: Any,
    format_name: str,
    fields: FieldsSection,
    ignore_columns: Sequence[str] = (),
    to_answer: bool = False,
) -> Parsed:
    """Parse one row.

    Args:
        row: as in the file: a dict, or a list of turns.
        format_name: a key of FORMATS, or "auto".
        fields: mapped columns (data.fields).
        ignore_columns: columns and keys of turns to ignore (data.ignore_columns).
        to_answer: the row is to be answered, not trained on: its last turn may lack a reply, which becomes NO_REPLY,
            and its replies need not be fit for training.

    Raises:
        RowRefused: this row cannot be trained on.
        UnknownFormat: its keys match no known format; the message suggests a mapping.
    """
    if isinstance(row, list) and row and all(isinstance(turn, Mapping) for turn in row):
        row = {"messages": row}  # JSON Lines of message lists
    if not isinstance(row, Mapping):
        raise UnknownFormat(
            f"a row must be an object with keys, found {json_type(row)}. {FORMATS_KNOWN}", code="row-not-object"
        )
    if ignore_columns:
        row = {key: value for key, value in row.items() if key not in ignore_columns}
    _refuse_other_media(row)
    _refuse_doubled_columns(fields)
    _refuse_absent_columns(row, fields, ignore_columns)
    try:
        name = detect_format(row, fields) if format_name == "auto" else format_name
        if hint := chosen_side_hint(row, fields) or rejected_label_hint(row, fields, name):
            raise UnknownFormat(hint, code="preference-data")
        may_be_turn = name in (None, "text") and not fields.text and format_name == "auto"
        if may_be_turn and (hint := lone_turn_hint(row)):
            raise UnknownFormat(hint, code="single-turn-row")
        if fields.label and not _is_wanted(row, fields.label):
            raise RowRefused(f"{fields.label} is false: a rejected reply", by_choice=True, code="rejected-reply")
        if name is None:
            raise UnknownFormat(describe_unknown(row), code="unknown-format")
        return _parse(row, name, fields, ignore_columns, to_answer)
    except RecursionError:
        raise RowRefused("is nested too deeply. Flatten it, or remove the row", code="nested-too-deeply") from None


def parse_document(
    row: Any, format_name: str, fields: FieldsSection, ignore_columns: Sequence[str] = (), to_answer: bool = False
) -> tuple[Parsed, LongText | None]:
    """`parse_row` for rows whose text may not be in memory.

    Raw text that is not in memory is parsed from its beginning, and returned beside it.

    Raises:
        RowRefused, UnknownFormat: as `parse_row`.
    """
    long_text = find_long_text(row)
    if long_text is not None:
        parsed = parse_row({**row, "text": long_text.head}, format_name, fields, ignore_columns, to_answer)
        if isinstance(parsed, RawText):
            return parsed, long_text
        row = {**row, "text": long_text.read()}
    return parse_row(row, format_name, fields, ignore_columns, to_answer), None


def _parse(row: Row, name: str, fields: FieldsSection, ignore_columns: Sequence[str], to_answer: bool) -> Parsed:
    if name == "xtuner" and not fields.messages:
        fields = fields.model_copy(update={"messages": _find_turns(row)[0] or None})
    reading = Reading(frozenset(ignore_columns))
    keys = Keys(row, ROW, reading)
    draft = FORMATS[name](keys, fields)
    if fields.label:
        keys.find(fields.label)
    _refuse_idle_fields(keys, name, fields)
    keys.close()
    try:
        if isinstance(draft, Draft):
            return _finish_chat(draft, reading, to_answer)
        texts = [draft.text] if isinstance(draft, RawText) else [text for text, _ in draft.parts]
        reading.settle(texts)
    except LostColumns as lost:
        reason = explain_lost_columns(row, lost.columns, name, fields)
        raise UnknownFormat(reason, loses_context=True, code="unread-context") from None
    refuse_lone_surrogates("".join(texts))
    if isinstance(draft, Segments):
        return Segments(draft.parts, tuple(reading.notes))
    if is_transcript(draft.text):
        reading.note(NOTE_TRANSCRIPT_TEXT)
    return RawText(draft.text, tuple(reading.notes))


@lru_cache(maxsize=64)
def _mapped(fields: FieldsSection) -> tuple[tuple[str, str], ...]:
    """Mapped columns of a row, each with its part of the chat."""
    return tuple((part, column) for part, column in fields if column and part not in ("role", "content"))


def _refuse_doubled_columns(fields: FieldsSection) -> None:
    """Refuse a column mapped to two parts: the model would learn to repeat its question."""
    parts: dict[str, str] = {}
    for part, column in _mapped(fields):
        if column in parts:
            raise UnknownFormat(
                f"data.fields.{parts[column]} and data.fields.{part} both name {column}. Map each column once",
                code="column-mapped-twice",
            )
        parts[column] = part


def _refuse_absent_columns(row: Row, fields: FieldsSection, ignored: Sequence[str]) -> None:
    """Refuse a mapped column that the row does not have: most likely a typo."""
    for part, column in _mapped(fields):
        if not find_column(row, column)[0]:
            if column in ignored:
                raise UnknownFormat(
                    f"{column} is both data.fields.{part} and in data.ignore_columns; keep one of them",
                    code="column-mapped-and-ignored",
                )
            raise UnknownFormat(
                f"the row has no column {column} (data.fields.{part}). Keys found: {list_keys(row)}.",
                code="mapped-column-missing",
            )


def _refuse_idle_fields(keys: Keys, name: str, fields: FieldsSection) -> None:
    """Refuse a mapped column that the format does not read: its contents would be lost."""
    for part, column in _mapped(fields):
        if not keys.was_read(column):
            raise UnknownFormat(
                f"data.fields.{part} {column} is not read by the format {name}. Remove the flag or choose another "
                "--data.format",
                code="mapped-column-unread",
            )


def _is_wanted(row: Row, label: str) -> bool:
    _, value = find_column(row, label)
    said = value.strip().lower() if isinstance(value, str) else value
    if isinstance(said, (str, int, float)) and said in ("true", "1", "false", "0", 1, 0):
        return said in ("true", "1", 1)
    raise RowRefused(f"{label} is {show(value)}, not true or false", code="label-not-boolean")


def _refuse_other_media(row: Row) -> None:
    for key in MEDIA_COLUMNS:
        if key in row and not is_missing(row[key]) and row[key] not in ([], "", {}):
            raise UnknownFormat(
                f"the row has {key}, but tunesmith trains on text only; training on the text alone would teach "
                "answers about something that the model cannot see. Leave such rows out.",
                code="media-not-supported",
            )


def _finish_chat(draft: Draft, reading: Reading, to_answer: bool) -> Conversation:
    """Checks common to chats of all formats."""
    messages = draft.messages = open_reply(draft.messages) if to_answer else draft.messages
    last_reply = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last_reply < 0:
        raise RowRefused(
            "no assistant turn; nothing to train. Add a reply, or remove the row", code="no-assistant-turn"
        )
    kept = messages[: last_reply + 1]
    trained = [(i, m) for i, m in enumerate(kept) if m.role == "assistant" and m.is_trained]
    if not trained:
        raise RowRefused(
            "every assistant turn has loss_weight 0; nothing to train", by_choice=True, code="nothing-to-train"
        )
    for index, message in trained if not to_answer else ():
        _refuse_bad_reply(index, message)
    reading.settle(text for m in messages for text in (m.content, m.reasoning_content) if text)
    refuse_lone_surrogates(_text_of(kept, draft))
    _note_oddities(draft, kept, reading)
    return Conversation(tuple(kept), draft.tools, tuple(reading.notes), draft.template_kwargs, draft.documents)


def open_reply(messages: list[Message]) -> list[Message]:
    """The chat with a reply at its end: NO_REPLY where it ends with another turn, or with an empty reply."""
    last = messages[-1] if messages else Message("user", "")
    if last.role != "assistant":
        return [*messages, Message("assistant", NO_REPLY)]
    begin = last.context_spans[0][1] if last.context_spans and last.context_spans[0][0] == 0 else 0
    if last.content[begin:].strip() or last.tool_calls:
        return messages
    spans = last.context_spans[:1] if begin else ()
    said = replace(last, content=last.content[:begin] + NO_REPLY, is_trained=True, context_spans=spans)
    return [*messages[:-1], said]


def _note_oddities(draft: Draft, kept: list[Message], reading: Reading) -> None:
    if len(kept) < len(draft.messages):
        reading.note(NOTE_UNANSWERED)
    questions = [m for m in kept if m.role == "user"]
    if not questions or any(not m.content.strip() for m in questions):
        reading.note(NOTE_EMPTY_QUESTION)
    others = [m for m in kept if m.role == "tool" or (m.role == "system" and not draft.tools)]
    if any(not m.content.strip() for m in others):  # MiniMind's system turn may have only tools
        reading.note(NOTE_EMPTY_CONTEXT)
    for message in kept:
        if message.role in ("user", "assistant") and is_transcript(message.content):
            reading.note(NOTE_TRANSCRIPT_QUESTION if message.role == "user" else NOTE_TRANSCRIPT_REPLY)
        if message.role == "assistant" and message.is_trained and has_braces(message.content):
            reading.note(NOTE_BRACES)


def _refuse_bad_reply(index: int, message: Message) -> None:
    if not message.content.strip() and not message.tool_calls:
        raise RowRefused(f"turn {index} (assistant) is empty. Write a reply, or remove the turn", code="reply-empty")
    placeholder = find_placeholder(message.content)
    if placeholder:
        raise RowRefused(
            f"turn {index} (assistant) contains the unfilled placeholder {placeholder}, which the model would learn "
            "to write",
            by_choice=True,
            code="placeholder-in-reply",
        )


def _text_of(messages: list[Message], draft: Draft) -> str:
    """All text of a chat, with keys and values of tool calls and schemas."""
    texts = [text for m in messages for text in (m.content, m.reasoning_content, m.name, m.tool_call_id) if text]
    values = [list(m.tool_calls) for m in messages if m.tool_calls]
    others = [*values, *draft.tools, draft.template_kwargs, *draft.documents]
    if any(others):
        try:
            texts.append(json.dumps(others, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise RowRefused(
                f"has a tool, a tool call or a document that is not JSON ({error})", code="not-json"
            ) from None
    return "".join(texts)


def refuse_lone_surrogates(text: str) -> None:
    """Refuse half characters.

    Raises:
        RowRefused: the text has one.
    """
    half = find_lone_surrogate(text)
    if half:
        raise RowRefused(
            f"contains the lone surrogate {half!r} (half a character), which no tokenizer can encode",
            code="lone-surrogate",
        )
