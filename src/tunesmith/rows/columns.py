"""Columns common to all formats: system prompt, tools, earlier turns, documents, template variables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.parts import read_content
from tunesmith.rows.tools import parse_tools
from tunesmith.rows.turns import is_lines, parse_turns, read_reasoning
from tunesmith.rows.values import as_text, parse_json
from tunesmith.sources.jsontext import load_json, parse_json_list

SYSTEM_NAMES = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
TOOLS_NAMES = ("tools", "functions")
HISTORY_NAMES = ("history",)
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking", "Complex_CoT", "cot", "chain_of_thought")
ASKED_NAMES = ("question", "query", "user", "human", "prompt", "instruction", "input")
ANSWERED_NAMES = ("answer", "response", "assistant", "bot", "gpt", "output")
PAST = "an earlier turn"


@dataclass(slots=True)
class Draft:
    """A chat while it is built from the columns of a row."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[Any, ...] = ()


def read_column(keys: Keys, mapped: str | None, names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the mapped column, else of the first of these names with a value."""
    if mapped:
        return mapped, keys.find(mapped)[1]
    name, value = keys.first(names)
    return name or names[0], value


def read_system(keys: Keys, fields: FieldsSection) -> str:
    """The row's system prompt, "" where there is none.

    Raises:
        RowRefused: two columns have different ones.
    """
    found: dict[str, str] = {}
    for name in (fields.system,) if fields.system else SYSTEM_NAMES:
        present, value = keys.find(name) if fields.system else (name in keys.values, keys.get(name))
        if present and (text := _system_text(value, name, keys.reading)).strip():
            found[name] = text
    if len(set(found.values())) > 1:
        raise RowRefused(
            f"{' and '.join(found)} have different system prompts; choose one with --data.fields.system",
            code="system-prompt-differs",
        )
    return next(iter(found.values()), "")


def _system_text(value: Any, name: str, reading: Reading) -> str:
    """A text, Anthropic's list of text parts, Gemini's {"parts"}."""
    if isinstance(value, Mapping):
        inner = Keys(value, name, reading)
        inner.drop("role")
        _, value = inner.first(("parts", "content", "text"))
        inner.close()
    if not isinstance(value, list):
        return as_text(value, name)
    content = read_content(value, reading)
    if content.calls or content.results or content.reasoning:
        raise RowRefused(f"{name} has parts that are not text. Write the system prompt as text", code="parts-not-text")
    return "\n\n".join(text for text in content.texts if text.strip())


def add_system(messages: list[Message], system: str) -> list[Message]:
    """The chat with its system prompt first.

    Raises:
        RowRefused: it begins with a different system prompt.
    """
    if not system.strip():
        return messages
    if not messages or messages[0].role != "system":
        return [Message("system", system), *messages]
    if not messages[0].content.strip():  # MiniMind's system turn may have only tools
        return [replace(messages[0], content=system), *messages[1:]]
    if messages[0].content.strip() != system.strip():
        raise RowRefused(
            "the system prompt in a column differs from the one in the first turn. Keep one, or leave the column out "
            "with --data.ignore_columns",
            code="system-prompt-differs",
        )
    return messages


def read_tools(keys: Keys, fields: FieldsSection, in_turns: tuple[dict[str, Any], ...] = ()) -> tuple[Any, ...]:
    """The tool schemas of the row, or of a turn of it.

    Raises:
        RowRefused: two places have different ones.
    """
    found = [in_turns] if in_turns else []
    for name in (fields.tools,) if fields.tools else TOOLS_NAMES:
        value = keys.find(name)[1] if fields.tools else keys.get(name) if name in keys.values else None
        if tools := parse_tools(value):
            found.append(tools)
    if any(tools != found[0] for tools in found):
        raise RowRefused("has two different lists of tools; choose one with --data.fields.tools", code="tools-differ")
    return found[0] if found else ()


def finish_draft(
    keys: Keys, fields: FieldsSection, messages: list[Message], tools: tuple[dict[str, Any], ...] = ()
) -> Draft:
    """Add what is not in the turns: system prompt, tools, template variables, documents."""
    draft = Draft(add_system(messages, read_system(keys, fields)), read_tools(keys, fields, tools))
    if "chat_template_kwargs" in keys.values:
        given = parse_json(keys.get("chat_template_kwargs") or {}, "chat_template_kwargs")
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise RowRefused(
                "chat_template_kwargs must be an object of template variables", code="template-kwargs-not-object"
            )
        draft.template_kwargs = dict(given)
    if "documents" in keys.values and isinstance(documents := parse_json_list(keys.values["documents"]), list):
        keys.drop("documents")
        draft.documents = tuple(documents)
    return draft


def read_past(keys: Keys, fields: FieldsSection) -> list[Message]:
    """The turns before a question: [question, answer] pairs, dicts of the two, or turns of a chat."""
    name, value = read_column(keys, fields.history, HISTORY_NAMES)
    items = parse_json_list(value)
    if items is None or items == [] or (isinstance(items, str) and not items.strip()):
        return []
    if isinstance(items, list) and all(isinstance(item, Mapping) for item in items):
        return _past_of_objects(items, fields, keys.reading)
    if not isinstance(items, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items):
        raise RowRefused(
            f"{name} is not a list of [question, answer] pairs. Write it so, or leave it out with "
            "--data.ignore_columns",
            code="history-not-pairs",
        )
    messages = []
    for question, answer in items:
        messages += [Message("user", as_text(question, name)), Message("assistant", as_text(answer, name))]
    return messages


def _past_of_objects(items: list[Any], fields: FieldsSection, reading: Reading) -> list[Message]:
    turn_keys = (fields.role,) if fields.role else ("role", "from")
    if any(key in items[0] for key in turn_keys):
        messages, tools = parse_turns(items, reading, fields.role, fields.content)
        if tools:
            raise RowRefused("history contains tools; put them into a column tools", code="tools-in-turns")
        return messages
    messages = []
    for item in items:
        inner = Keys(item, PAST, reading)
        asked, question = inner.first(ASKED_NAMES)
        answered, answer = inner.first(ANSWERED_NAMES)
        if not asked or not answered:
            raise RowRefused(
                f"history has an item without a question and an answer (keys found: {', '.join(map(str, item))})",
                code="history-item-incomplete",
            )
        messages += [Message("user", as_text(question, asked)), Message("assistant", as_text(answer, answered))]
        inner.close()
    return messages


def read_thoughts(keys: Keys, fields: FieldsSection) -> str | None:
    """The reasoning of the reply, from its own column."""
    if fields.reasoning:
        value = keys.find(fields.reasoning)[1]
        return as_text("\n".join(value) if is_lines(value) else value, fields.reasoning) or None
    return read_reasoning(keys, REASONING_NAMES)


_TRANSCRIPT = re.compile(r"\s*(?:Human|H): ?")
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant|H|A):[ \t]*")


def parse_transcript(text: str) -> list[Message]:
    """Turns of hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."; none for other texts."""
    if not _TRANSCRIPT.match(text):
        return []
    pieces = _SPEAKER.split(text.strip())
    if pieces[0].strip():
        return []
    speakers = {"Human": "user", "H": "user", "Assistant": "assistant", "A": "assistant"}
    return [Message(speakers[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def is_json_of_turns(text: str) -> bool:
    """Whether a text is JSON of a list of role turns."""
    if not text.lstrip().startswith("[") or not ('"role"' in text or '"from"' in text):
        return False
    try:
        turns = load_json(text)
    except json.JSONDecodeError:
        return False
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, Mapping) for t in turns)
