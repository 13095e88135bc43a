"""A row's dict -> Conversation or RawText. Every format that people have, recognised from the row itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.config import FieldsSection
from tunesmith.data.conversation import (
    NOTE_EMPTY_CONTEXT,
    NOTE_EMPTY_QUESTION,
    NOTE_UNANSWERED,
    Conversation,
    Message,
    Parsed,
    RawText,
    RowRefused,
    UnknownFormat,
    find_lone_surrogate,
)
from tunesmith.data.hints import (
    FORMATS_KNOWN,
    chosen_side_hint,
    describe_unknown,
    find_placeholder,
    list_keys,
    not_json_hint,
    rejected_label_hint,
)
from tunesmith.data.jsontext import load_json
from tunesmith.data.turns import ROLE_KEYS, as_text, is_missing, parse_tools, parse_turn, parse_turns

Row = Mapping[str, Any]


def find_column(row: Row, path: str) -> tuple[bool, Any]:
    """Whether there is a column of this name, and its value; dots reach into lists and dicts ("instances.0.output")."""
    if path in row:
        return True, row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def get_column(row: Row, path: str) -> Any:
    """The value under a column name, None where it is absent, null or NaN."""
    _, value = find_column(row, path)
    return None if is_missing(value) else value


def _json_list(value: Any) -> Any:
    """CSV and Parquet often keep a list of turns as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return load_json(value)
        except json.JSONDecodeError:
            return value
    return value


def _turns_or_text(value: Any) -> Any:
    """A prompt or completion: JSON text counts as turns only where it holds objects; "[1, 2]" is an answer."""
    loaded = _json_list(value)
    is_turns = isinstance(loaded, list) and bool(loaded) and all(isinstance(turn, Mapping) for turn in loaded)
    return loaded if is_turns or not isinstance(value, str) else value


def _system_of(row: Row, fields: FieldsSection) -> list[Message]:
    name = fields.system or "system"
    text = as_text(get_column(row, name), name)
    return [Message("system", text)] if text.strip() else []


def _tools_of(row: Row, fields: FieldsSection) -> tuple[dict[str, Any], ...]:
    return parse_tools(get_column(row, fields.tools or "tools"))


def parse_messages(row: Row, fields: FieldsSection) -> Conversation:
    """{"messages": [{"role", "content"}]}, MiniMind's "conversations", ShareGPT's {"from", "value"}."""
    names = [fields.messages] if fields.messages else ["messages", "conversations"]
    turns = next((v for n in names if (v := _json_list(get_column(row, n))) is not None), None)
    if not isinstance(turns, list):
        raise RowRefused(not_json_hint(names[0], turns) or f"{names[0]} is not a list of turns")
    messages, tools = parse_turns(turns, fields.role, fields.content)
    if not any(m.role == "system" for m in messages[:1]):
        messages = _system_of(row, fields) + messages
    return finish(messages, _tools_of(row, fields) or tools)


def parse_prompt_completion(row: Row, fields: FieldsSection) -> Conversation:
    """{"prompt", "completion"}, each a string or a list of messages."""
    prompt_name, completion_name = fields.prompt or "prompt", fields.completion or "completion"
    prompt = _turns_or_text(get_column(row, prompt_name))
    completion = _turns_or_text(get_column(row, completion_name))
    if prompt is None or completion is None:
        missing = prompt_name if prompt is None else completion_name
        raise RowRefused(f"column {missing} is missing or null (keys found: {', '.join(map(str, row))})")
    messages = _system_of(row, fields)
    tools: tuple[dict[str, Any], ...] = ()
    if isinstance(prompt, list):
        turns, tools = parse_turns(prompt, fields.role, fields.content)
        messages = turns if turns and turns[0].role == "system" else messages + turns
        messages = [dataclasses.replace(m, is_trained=False) for m in messages]  # a prompt is context
    else:
        messages.append(Message("user", as_text(prompt, prompt_name)))
    if isinstance(completion, list):
        messages += parse_turns(completion, fields.role, fields.content)[0]
    elif isinstance(completion, Mapping):
        messages.append(parse_turn(completion, fields.role, fields.content))
    else:
        messages.append(Message("assistant", as_text(completion, completion_name)))
    return finish(messages, _tools_of(row, fields) or tools)


def parse_alpaca(row: Row, fields: FieldsSection) -> Conversation:
    """{"instruction", "input" (Dolly: "context"), "output" or "response", "system", "history" [[question, answer]]}."""
    names = [fields.output] if fields.output else ["output", "response"]
    output = next((v for n in names if (v := get_column(row, n)) is not None), None)
    if output is None:
        raise RowRefused(f"column {names[0]} is missing or null (keys found: {', '.join(map(str, row))})")
    instruction_name, input_name = fields.instruction or "instruction", fields.input
    input_name = input_name or ("input" if "input" in row else "context")
    instruction = as_text(get_column(row, instruction_name), instruction_name)
    extra = as_text(get_column(row, input_name), input_name)
    messages = _system_of(row, fields)
    history = _json_list(get_column(row, fields.history or "history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowRefused("history is not a list of [question, answer] pairs")
    for pair in history:
        messages += [Message("user", as_text(pair[0], "history"))]
        messages += [Message("assistant", as_text(pair[1], "history"))]
    question = "\n".join(part for part in (instruction, extra) if part.strip())
    messages += [Message("user", question), Message("assistant", as_text(output, names[0]))]
    return finish(messages, _tools_of(row, fields))


def parse_xtuner(row: Row, fields: FieldsSection) -> Conversation:
    """{"conversation": [{"system", "input", "output"}, ...]}."""
    turns = _json_list(get_column(row, fields.messages or "conversation"))
    if not isinstance(turns, list):
        raise RowRefused("conversation is not a list of turns")
    messages: list[Message] = []
    first_system = ""
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "output" not in turn:
            raise RowRefused(f"turn {number} of conversation has no output")
        system = as_text(turn.get("system"), "system")
        if system.strip() and number == 0:
            first_system = system
            messages.append(Message("system", system))
        if system.strip() and system != first_system:
            raise RowRefused(f"turn {number} of conversation has another system prompt than the first turn")
        question = as_text(turn.get("input"), "input")
        if question.strip():  # xtuner writes a bare {"output"} for a turn that only continues
            messages.append(Message("user", question))
        messages.append(Message("assistant", as_text(turn["output"], "output")))
    return finish(messages, _tools_of(row, fields))


def parse_text(row: Row, fields: FieldsSection) -> RawText:
    """{"text"}: pre-training, every token trained. A list of strings is joined by line breaks."""
    name = fields.text or "text"
    value = get_column(row, name)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    text = as_text(value, name)
    if not text.strip():
        raise RowRefused(f"{name} is empty")
    return RawText(text)


FORMATS: dict[str, Callable[[Row, FieldsSection], Parsed]] = {
    "messages": parse_messages,
    "sharegpt": parse_messages,  # the turn itself tells role/content from from/value
    "prompt_completion": parse_prompt_completion,
    "alpaca": parse_alpaca,
    "xtuner": parse_xtuner,
    "text": parse_text,
}


def recognise_format(row: Row, fields: FieldsSection) -> str | None:
    """The name of the format that the mapped columns, else the row's own keys, stand for; None if unknown."""
    if fields.prompt or fields.completion:
        return "prompt_completion"
    if fields.messages:
        turns = _json_list(get_column(row, fields.messages))
        has_pairs = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping)
        return "xtuner" if has_pairs and "output" in turns[0] and "input" in turns[0] else "messages"
    if fields.text:
        return "text"
    if fields.instruction or fields.output:
        return "alpaca"
    for name in ("messages", "conversations"):
        turns = _json_list(row.get(name))
        if isinstance(turns, list):
            return "messages" if _turns_have_roles(turns, fields) else None
    turns = _json_list(row.get("conversation"))
    if isinstance(turns, list) and all(isinstance(t, Mapping) and "output" in t for t in turns):
        return "xtuner"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if isinstance(row.get("text"), str):
        return "text"
    return None


def _turns_have_roles(turns: list[Any], fields: FieldsSection) -> bool:
    keys = (fields.role,) if fields.role else ROLE_KEYS
    return all(isinstance(turn, Mapping) and any(key in turn for key in keys) for turn in turns)


def parse_row(row: Any, format_name: str, fields: FieldsSection) -> Parsed:
    """One row's value as a Conversation or RawText.

    Args:
        row: what the file holds, a dict in every known format.
        format_name: a key of FORMATS, or "auto".
        fields: columns that the person named.

    Raises:
        RowRefused: this row cannot be trained on.
        UnknownFormat: its keys mean nothing to us; the message names the mapping that would help.
    """
    if not isinstance(row, Mapping):
        raise UnknownFormat(f"a row must be an object with keys, found {type(row).__name__}. {FORMATS_KNOWN}")
    _refuse_other_media(row)
    _refuse_absent_columns(row, fields)
    name = recognise_format(row, fields) if format_name == "auto" else format_name
    hint = chosen_side_hint(row, fields) or rejected_label_hint(row, fields, name)
    if hint:
        raise UnknownFormat(hint)
    if fields.label and not _is_wanted(row, fields.label):
        raise RowRefused(f"{fields.label} is false: a reply that its readers rejected", by_choice=True)
    if name is None:
        raise UnknownFormat(describe_unknown(row))
    try:
        parsed = FORMATS[name](row, fields)
        _refuse_lone_surrogates(parsed)
    except RecursionError:
        raise RowRefused("is nested too deeply") from None
    return parsed


def _refuse_absent_columns(row: Row, fields: FieldsSection) -> None:
    """A column that the person named and that is not there is a typing error; without it, rows would be half empty."""
    for part, column in fields:
        if column and part not in ("role", "content") and not find_column(row, column)[0]:
            raise UnknownFormat(f"the row has no column {column} (data.fields.{part}). Keys found: {list_keys(row)}.")


def _is_wanted(row: Row, label: str) -> bool:
    value = get_column(row, label)
    said = value.strip().lower() if isinstance(value, str) else value
    if isinstance(said, (str, int, float)) and said in ("true", "1", "false", "0", 1, 0):
        return said in ("true", "1", 1)
    raise RowRefused(f"{label} is {value!r}, not true or false")


def _refuse_lone_surrogates(parsed: Parsed) -> None:
    if isinstance(parsed, RawText):
        text = parsed.text
    else:
        turns = [message.to_template() for message in parsed.messages]
        text = json.dumps([turns, parsed.tools], ensure_ascii=False, default=str)
    half = find_lone_surrogate(text)
    if half:
        raise RowRefused(f"holds the lone surrogate {half!r}, half of a character, which no tokenizer can encode")


def _refuse_other_media(row: Row) -> None:
    for key in ("images", "image", "videos", "video", "audios", "audio"):
        if not is_missing(row.get(key)) and row[key] not in ([], "", {}):
            raise UnknownFormat(
                f"the row carries {key}, and tunesmith trains on text only; training on its text alone would "
                "teach answers to questions that the model cannot see. Leave such rows out."
            )


def finish(messages: list[Message], tools: tuple[dict[str, Any], ...]) -> Conversation:
    """The checks that every chat passes through, whatever its format was."""
    last_reply = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last_reply < 0:
        raise RowRefused("no assistant turn: a question without an answer teaches nothing")
    kept = messages[: last_reply + 1]
    trained = [m for m in kept if m.role == "assistant" and m.is_trained]
    if not trained:
        raise RowRefused("every assistant turn has loss_weight 0: nothing to train", by_choice=True)
    for index, message in enumerate(kept):
        if message.role == "assistant" and message.is_trained:
            _refuse_bad_reply(index, message)
    return Conversation(tuple(kept), tools, _notes_of(messages, kept, tools))


def _notes_of(messages: list[Message], kept: list[Message], tools: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    notes = [NOTE_UNANSWERED] if len(kept) < len(messages) else []
    questions = [m for m in kept if m.role == "user"]
    if not questions or any(not m.content.strip() for m in questions):
        notes.append(NOTE_EMPTY_QUESTION)
    others = [m for m in kept if m.role == "tool" or (m.role == "system" and not tools)]
    if any(not m.content.strip() for m in others):  # MiniMind's system turn may hold tools alone
        notes.append(NOTE_EMPTY_CONTEXT)
    return tuple(notes)


def _refuse_bad_reply(index: int, message: Message) -> None:
    if not message.content.strip() and not message.tool_calls:
        raise RowRefused(f"turn {index} (assistant) is empty")
    placeholder = find_placeholder(message.content)
    if placeholder:
        raise RowRefused(
            f"turn {index} (assistant) holds the unfilled placeholder {placeholder}, which the model would "
            "learn to say",
            by_choice=True,
        )
