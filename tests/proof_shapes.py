"""Rows with tools, reasoning and documents, for the tests of the label proof."""

from __future__ import annotations

import json
from typing import Any

from test_matrix import SYSTEM, a, u

Row = dict[str, Any]


def call(name: str, arguments: Any, call_id: str | None = None) -> Row:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **made} if call_id else made


def tool(text: str, call_id: str | None = None, name: str = "get_weather") -> Row:
    made = {"role": "tool", "name": name, "content": text}
    return {**made, "tool_call_id": call_id} if call_id else made


def schema(name: str, description: str, **properties: Any) -> Row:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = schema("get_weather", "How the weather is.", city={"type": "string", "description": "Name of a town."})
CLOCK = schema("read_clock", "What time it is.", zone={"type": "string", "description": "Offset from Greenwich."})
TRIP = schema(
    "plan_trip",
    "Plans a journey.",
    start={"type": "string", "description": "Where it begins."},
    mode={"type": "string", "enum": ["train", "boat"], "description": "How to travel."},
    party={
        "type": "object",
        "description": "Who comes along.",
        "properties": {"grownups": {"type": "integer", "description": "Older than twelve."}},
    },
    stops={"type": "array", "items": {"type": "string"}, "description": "Places between."},
)
OSLO = {"city": "Oslo"}
HARD = {
    "nothing": None,
    "off": False,
    "on": True,
    "whole": 41,
    "part": 7.25,
    "inner": {"deep": {"deeper": "Grund", "none": None}, "list": [57, "vier", False]},
    "empty": {},
    "bare": [],
    "words": ["Ærø", "你好", "🙂"],
    "text": 'He said "no".\nThen \\ he left.',
}
_A, _B = "AbCdEfG12", "HiJkLmN34"
ID = "QrStUvW56"

SHAPES: dict[str, Row] = {
    "schema not called": {"messages": [u("Who?"), a("Nobody.")], "tools": [WEATHER]},
    "two schemas, one called": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It rains.")],
        "tools": [WEATHER, CLOCK],
    },
    "content says what the call says": {
        "messages": [u("Rain?"), a("I ask get_weather for city Oslo.", tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It rains.")],
        "tools": [WEATHER],
    },
    "content says what the schema says": {
        "messages": [u("Rain?"), a("With get_weather: How the weather is. Give city: Name of a town.")],
        "tools": [WEATHER],
    },
    "content says what the reasoning says": {
        "messages": [u("Why?"), a("Because salt melts ice. So.", reasoning_content="salt melts ice")]
    },
    "two identical calls": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, _A), call("get_weather", OSLO, _B)]), tool("wet", _A), tool("dry", _B), a("Both.")],
        "tools": [WEATHER],
    },
    "two calls in a turn": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, _A), call("read_clock", {"zone": "+1"}, _B)]), tool("wet", _A), tool("noon", _B, "read_clock"), a("Wet at noon.")],
        "tools": [WEATHER, CLOCK],
    },
    "hard arguments": {
        "messages": [u("Go."), a("", tool_calls=[call("plan_trip", HARD, ID)]), tool("done", ID, "plan_trip"), a("It is planned.")],
        "tools": [TRIP],
    },
    "nested schema": {"messages": [u("Go."), a("Where to?")], "tools": [TRIP]},
    "arguments as text": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", json.dumps({"city": "Oslo", "days": 3}), ID)]), tool("wet", ID), a("It rains.")],
        "tools": [WEATHER],
    },
    "call without arguments": {
        "messages": [u("Time?"), a("", tool_calls=[call("read_clock", {}, ID)]), tool("noon", ID, "read_clock"), a("Noon.")],
        "tools": [CLOCK],
    },
    "tool result is JSON": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, ID)]), tool('{"sky": "grey", "mm": [3, null]}', ID), a("It rains.")],
        "tools": [WEATHER],
    },
    "calls in history": {
        "messages": [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, _A)]), tool("wet", _A), a("It rains."), u("And now?"), a("", tool_calls=[call("get_weather", {"city": "Rome"}, _B)]), tool("hot", _B), a("Not in Rome.")],
        "tools": [WEATHER],
    },
    "reasoning, words and a call": {
        "messages": [u("Rain?"), a("I look.", reasoning_content="Better ask.", tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It rains.", reasoning_content="It said wet.")],
        "tools": [WEATHER],
    },
    "system inside the question": {"messages": [SYSTEM, u("He wrote: Be brief, Sir. Why?"), a("He was rude.")]},
    "equal turns": {"messages": [u("Why?"), a("Yes."), u("Why?"), a("Yes."), u("Yes."), a("Why?")]},
    "greeting first": {"messages": [a("Hello there."), u("Who are you?"), a("A model.")]},
    "greeting behind a system prompt": {"messages": [SYSTEM, a("Hello there."), u("Who are you?"), a("A model.")]},
    "thoughts in the content": {"messages": [u("Why?"), a("<think>\nSalt.\n</think>\n\nIce melts."), u("So?"), a("<think>\nDone.\n</think>\n\nIt is wet.")]},
    "empty thoughts in the content": {"messages": [u("Why?"), a("<think>\n\n</think>\n\nIce melts.")]},
    "tags behind the words": {"messages": [u("Why?"), a("The tag </think> ends it, <think> begins it.")]},
    "a mark that is no answer": {"messages": [u("<tool_response>wet</tool_response>"), a("So it is.")]},
    "prefill": {"prompt": [u("Why?"), a("Because ")], "completion": [a("ice melts.")]},
    "variables": {"messages": [u("Why?"), a("Ice melts.")], "chat_template_kwargs": {"enable_thinking": False}},
    "documents": {"messages": [u("Why?"), a("Ice melts.")], "documents": [{"title": "Salt", "text": "It lowers a point."}]},
    "names": {"messages": [{**u("Why?"), "name": "Ada"}, a("Ice melts.")]},
}  # fmt: skip


def messages_of(row: Row) -> list[Row]:
    """The turns of a row; a prefill and its continuation count as one."""
    if "messages" in row:
        return list(row["messages"])
    *before, prefill = row["prompt"]
    [said] = row["completion"]
    return [*before, {**prefill, "content": prefill["content"] + said["content"]}]
