"""Chats with which a template is compared: as messages of ours, and as requests of the chat API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import Renderer
from tunesmith.rows.conversation import Message

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city today.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "name of the city"}},
            "required": ["city"],
        },
    },
}
_QUESTIONS = ("What is the capital of France?", "请介绍一下你自己。", "Thanks! And 12 * 3?")
_ANSWERS = ("Paris.", "我是一个助手。", "It is 36.\n\nAnything else?")
_SYSTEM = "You are a helpful assistant.\nAnswer briefly."


@dataclass(frozen=True, slots=True)
class ProbeChat:
    """A chat and the text that the template makes of it.

    Attributes:
        shape: what is in it, for messages.
        request: of the chat API.
        text: rendered up to where the reply begins.
    """

    shape: str
    request: dict[str, Any]
    text: str


def probe_chats(renderer: Renderer) -> Iterator[ProbeChat]:
    """The chats that a template accepts."""
    for shape, messages, tools in _conversations(renderer.habits.writes_calls):
        try:
            text = renderer.render(messages, tools, add_generation_prompt=True)
        except TemplateRefused:
            continue
        request: dict[str, Any] = {"messages": [_as_request(message) for message in messages]}
        yield ProbeChat(shape, request | ({"tools": list(tools)} if tools else {}), text)


def _conversations(has_calls: bool) -> Iterator[tuple[str, list[Message], Sequence[dict[str, Any]]]]:
    system = [Message("system", _SYSTEM)]
    for number in range(len(_QUESTIONS)):
        turns = [Message("user", _QUESTIONS[0])]
        for place in range(number):
            turns += [Message("assistant", _ANSWERS[place]), Message("user", _QUESTIONS[place + 1])]
        count = f"{number + 1} question{'s' if number else ''}"
        yield count, turns, ()
        yield f"system prompt and {count}", [*system, *turns], ()
    if has_calls:
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
        }
        asked = [*system, Message("user", "How is the weather in Paris?")]
        yield "tools", asked, [_TOOL]
        result = Message("tool", '{"degrees": 21}', name="get_weather", tool_call_id="call00001")
        yield "a tool call", [*asked, Message("assistant", "", tool_calls=(call,)), result], [_TOOL]


def _as_request(message: Message) -> dict[str, Any]:
    request = dict(message.to_template())
    if calls := request.get("tool_calls"):
        request["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    return request
