"""One turn of a chat in any of its spellings -> Message; tool schemas and tool calls with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tunesmith.data.conversation import Message, RowRefused, UnknownFormat
from tunesmith.data.jsontext import load_json

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
_EXACT_INTEGERS = 2**53  # floats hold every integer up to here
MEDIA_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


def is_missing(value: Any) -> bool:
    """null, or NaN, which Parquet and pandas write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, what: str) -> str:
    """A text as it stands, a number as people write it, "" for what is missing."""
    if is_missing(value):
        return ""
    if isinstance(value, float) and abs(value) < _EXACT_INTEGERS and value.is_integer():
        return str(int(value))  # a column of integers becomes one of floats where some are missing
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isinf(value):
        return str(value)
    if not isinstance(value, str):
        raise RowRefused(f"{what} is {type(value).__name__}, not text")
    return value


def parse_turns(
    turns: list[Any], role_key: str | None = None, content_key: str | None = None
) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The turns of a chat, and the tool schemas where its system turn carries them (MiniMind)."""
    if not turns:
        raise RowRefused("the list of turns is empty")
    messages = []
    tools: tuple[dict[str, Any], ...] = ()
    for number, turn in enumerate(turns):
        try:
            messages.append(parse_turn(turn, role_key, content_key))
            if isinstance(turn, Mapping) and turn.get("tools"):
                tools = parse_tools(turn["tools"])
        except RowRefused as refusal:
            raise type(refusal)(f"turn {number}: {refusal.reason}", refusal.by_choice) from None
    return messages, tools


def parse_turn(turn: Any, role_key: str | None = None, content_key: str | None = None) -> Message:
    if not isinstance(turn, Mapping):
        raise RowRefused(f"is {type(turn).__name__}, not an object with role and content")
    said_role = _first(turn, (role_key,) if role_key else ROLE_KEYS)
    if said_role is None:
        raise _missing_key("role", role_key, turn)
    role = ROLES.get(said_role.strip().lower()) if isinstance(said_role, str) else None
    if role is None:
        raise RowRefused(f"unknown role {said_role!r}; known: {', '.join(ROLES)}")
    content_keys = (content_key,) if content_key else CONTENT_KEYS
    if not any(key in turn for key in content_keys) and not (turn.get("tool_calls") or turn.get("tools")):
        raise _missing_key("content", content_key, turn)
    content = _first(turn, content_keys)
    if said_role == "function_call":
        return Message(role, "", tool_calls=parse_tool_calls(content), is_trained=_is_trained(turn, role))
    text, reasoning, calls = _read_content(content)
    if turn.get("tool_calls"):
        calls += parse_tool_calls(turn["tool_calls"])
    said_reasoning = turn.get("reasoning_content")
    if isinstance(said_reasoning, str) and said_reasoning.strip():
        reasoning = said_reasoning
    name = as_text(turn.get("name"), "name") or None
    return Message(role, text, reasoning or None, calls, _is_trained(turn, role), name)


def _missing_key(part: str, mapped: str | None, turn: Mapping[str, Any]) -> RowRefused:
    """A key that the person named themselves and that is not there is a mistake of the command, not of one row."""
    reason = f"has no {mapped or part} (keys found: {', '.join(map(str, turn))}). Name it with --data.fields.{part}"
    return UnknownFormat(reason) if mapped else RowRefused(reason)


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((turn[key] for key in keys if key in turn), None)


def _is_trained(turn: Mapping[str, Any], role: str) -> bool:
    """loss_weight (0 or 1), or OpenAI's weight, or train (bool). Other weights are refused, not rounded."""
    for key in ("loss_weight", "weight", "train"):
        weight = turn.get(key)
        if is_missing(weight):
            continue
        if weight not in (0, 1):
            raise RowRefused(f"{key} is {weight!r}; only 0 (not trained) and 1 (trained) are known")
        if role != "assistant" and weight == 1 and key != "train":
            raise RowRefused(f"a {role} turn has {key} 1, but only assistant turns are trained")
        return bool(weight)
    return True


def _read_content(content: Any) -> tuple[str, str, tuple[dict[str, Any], ...]]:
    """Text, reasoning and tool calls of a turn whose content is text, null, or a list of typed parts."""
    if not isinstance(content, list):
        return as_text(content, "content"), "", ()
    texts: list[str] = []
    reasonings: list[str] = []
    calls: tuple[dict[str, Any], ...] = ()
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        value = (
            part
            if isinstance(part, str)
            else _first(part, ("text", "value", "reasoning", "tool_call"))
            if part
            else None
        )
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("reasoning", "thinking") and isinstance(value, str):
            reasonings.append(value)
        elif kind == "tool_call":
            calls += parse_tool_calls(value)
        elif kind in MEDIA_PARTS:
            raise RowRefused(f"holds a part of type {kind}; tunesmith trains on text only")
        else:
            raise RowRefused(f"holds a part of unknown type {kind!r}; known: text, reasoning, tool_call")
    return "".join(texts), "".join(reasonings), calls


def _load_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except json.JSONDecodeError as error:
        raise RowRefused(f"{what} is not JSON ({error.msg} at character {error.pos})") from None


def parse_tool_calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls as a list, one object, or JSON text of either; arguments as an object or JSON text."""
    loaded = _load_json(value, "a tool call")
    calls = []
    for call in loaded if isinstance(loaded, list) else [loaded]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefused("a tool call has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = _load_json(arguments, f"the arguments of {function['name']}")
        arguments = drop_nulls(arguments) if isinstance(call, Mapping) and "function" in call else arguments
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return tuple(calls)


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool schemas as a list or JSON text, bare or wrapped in {"type": "function", "function": ...}."""
    if is_missing(value) or value == "" or value == []:
        return ()
    loaded = _load_json(value, "tools")
    if isinstance(loaded, Mapping):
        loaded = [loaded]
    if not isinstance(loaded, list) or not all(
        isinstance(tool, Mapping) and isinstance(tool.get("function", tool), Mapping) for tool in loaded
    ):
        raise RowRefused("tools is not a list of tool schemas")
    return tuple(drop_nulls(dict(tool)) for tool in loaded)


def drop_nulls(value: Any) -> Any:
    """Without the null keys that Arrow adds to give all rows the same shape."""
    if isinstance(value, dict):
        return {key: drop_nulls(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value
