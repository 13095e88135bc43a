"""Parse typed content parts of a turn into text, reasoning, tool calls and tool results.

OpenAI (text, input_text, output_text), Anthropic (thinking, tool_use, tool_result), Gemini (functionCall, thought),
LLaMA-Factory (reasoning, tool_call).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.rows.conversation import RowRefused
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.tools import parse_tool_calls
from tunesmith.rows.values import as_text, json_type, show

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking", "reasoning_text", "summary_text")
CALL_PARTS = ("tool_call", "tool_use", "function_call")
RESULT_PARTS = ("tool_result", "function_call_output", "tool_response")
MEDIA_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio",
               "file", "input_file", "inlineData", "inline_data", "fileData", "file_data")  # fmt: skip
PART = "a part"
NOTE_TEXT_AFTER_CALL = "has text after a tool call in one turn; templates write it before the call"


@dataclass(slots=True)
class Result:
    """A tool result inside the turn of another role (Anthropic, Gemini)."""

    text: str
    call_id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Content:
    """The content of a turn, sorted by kind of part."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: tuple[dict[str, Any], ...] = ()
    results: list[Result] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def read_content(value: Any, reading: Reading) -> Content:
    """Text, or a list of typed parts, or one part."""
    if isinstance(value, Mapping) and ("type" in value or "text" in value):
        value = [value]
    if not isinstance(value, list):
        return Content([as_text(value, "content")])
    content = Content()
    for part in value:
        if isinstance(part, str):
            content.texts.append(part)
        elif isinstance(part, Mapping):
            _read_part(Keys(part, PART, reading), content, reading)
        else:
            raise RowRefused(
                f"has a part that is {json_type(part)}, not text or an object with a type", code="part-not-object"
            )
    return content


def _read_part(keys: Keys, content: Content, reading: Reading) -> None:
    kind = _kind_of(keys)
    if kind in TEXT_PARTS:
        _, text = keys.first(("text", "value", "content"))
        if not isinstance(text, str):
            raise RowRefused(f"has a part of type {kind} without text", code="part-without-text")
        is_thought = keys.get("thought") is True  # Gemini
        if content.calls and text.strip() and not is_thought:
            reading.note(NOTE_TEXT_AFTER_CALL)
        (content.reasoning if is_thought else content.texts).append(text)
    elif kind in REASONING_PARTS:
        _, text = keys.first(("text", "value", "thinking", "reasoning", "content"))
        if not isinstance(text, str):
            raise RowRefused(f"has a part of type {kind} without text", code="part-without-text")
        content.reasoning.append(text)
    elif kind in CALL_PARTS:
        _read_call(keys, kind, content, reading)
    elif kind in RESULT_PARTS:
        content.results.append(_read_result(keys, reading))
    elif kind == "refusal":
        content.texts.append(as_text(keys.get("refusal"), "refusal"))
    elif kind == "redacted_thinking":
        raise RowRefused("has redacted thinking, which is unreadable; leave such rows out", code="redacted-thinking")
    elif kind in MEDIA_PARTS:
        raise RowRefused(f"has a part of type {kind}; tunesmith trains on text only", code="media-not-supported")
    else:
        known = ", ".join((*TEXT_PARTS, *REASONING_PARTS[:2], *CALL_PARTS[:2], "tool_result"))
        raise RowRefused(f"has a part of unknown type {show(kind)}; known: {known}", code="unknown-part-type")
    keys.close()


def _kind_of(keys: Keys) -> Any:
    """Type of a part; Gemini's parts have none and are recognized by their key."""
    kind = keys.get("type")
    if kind is not None:
        return kind
    values = keys.values
    for key, named in (("functionCall", "tool_call"), ("function_call", "tool_call"),
                       ("functionResponse", "tool_result"), ("function_response", "tool_result")):  # fmt: skip
        if values.get(key) is not None:
            return named
    media = next((key for key in MEDIA_PARTS if values.get(key)), None)
    return media or ("text" if isinstance(values.get("text"), str) else None)


def _read_call(keys: Keys, kind: str, content: Content, reading: Reading) -> None:
    _, wrapped = keys.first(("tool_call", "functionCall", "function_call", "value", "text"))
    if wrapped is not None:
        content.calls += parse_tool_calls(wrapped, reading)
        return
    content.calls += parse_tool_calls(keys.values, reading)  # the part itself is the call (Anthropic)
    keys.drop(*keys.values)


def _read_result(keys: Keys, reading: Reading) -> Result:
    _, wrapped = keys.first(("functionResponse", "function_response"))
    if isinstance(wrapped, Mapping):
        inner = Keys(wrapped, PART, reading)
        _, call_id = inner.first(("id",))
        result = Result(_result_text(inner.get("response"), reading), _id_of(call_id), _id_of(inner.get("name")))
        inner.close()
        return result
    _, call_id = keys.first(("tool_use_id", "tool_call_id", "call_id"))
    _, value = keys.first(("content", "output", "value", "text"))
    keys.drop("is_error")  # the text says so
    return Result(_result_text(value, reading), _id_of(call_id), _id_of(keys.get("name")))


def _id_of(value: Any) -> str | None:
    return as_text(value, "an id") or None


def _result_text(value: Any, reading: Reading) -> str:
    """A tool result as text: itself, its parts joined, or an object as JSON."""
    if isinstance(value, list):
        inner = read_content(value, reading)
        if inner.calls or inner.results or inner.reasoning:
            raise RowRefused("has a tool result with parts that are not text", code="result-not-text")
        return inner.text
    return as_json(value) if isinstance(value, Mapping) else as_text(value, "a tool result")


def as_json(value: Any) -> str:
    """A tool result as JSON text."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowRefused(f"has a tool result that is not JSON ({error})", code="result-not-json") from None


def is_object(value: Any) -> bool:
    """Whether content is a plain object or a list of objects, not typed parts."""
    items = value if isinstance(value, list) else [value]
    known = ("type", "text", "functionResponse", "function_response")
    return bool(items) and all(isinstance(i, Mapping) and not any(key in i for key in known) for i in items)
