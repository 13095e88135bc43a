"""Convert tool schemas and tool calls of all vendors to the form that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.rows.conversation import RowRefused
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.values import as_text, is_missing, json_type, parse_json, plain_numbers

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # OpenAI, Llama 3, Gemini, Anthropic
CALL_ID_KEYS = ("id", "call_id", "tool_call_id")
CALL = "a tool call"


def parse_tool_calls(value: Any, reading: Reading | None = None) -> tuple[dict[str, Any], ...]:
    """Calls as a list, one object, or JSON text of either.

    The arguments stay an object or the JSON text of the row, unchanged.

    Args:
        reading: collects unread keys; if None, an unread key refuses the call.
    """
    loaded = parse_json(value, CALL)
    noticed = Reading() if reading is None else reading
    calls = tuple(_parse_call(call, noticed) for call in (loaded if isinstance(loaded, list) else [loaded]))
    if reading is None and noticed.unread:
        raise RowRefused(f"{CALL} has the unknown key {noticed.unread[0][1]}", code="unread-call-key")
    return calls


def _parse_call(call: Any, reading: Reading) -> dict[str, Any]:
    call = parse_json(call, CALL)  # in a column of type list[str]
    if not isinstance(call, Mapping):
        raise RowRefused(f"{CALL} is {json_type(call)}, not an object with a name", code="call-not-object")
    outer = Keys(call, CALL, reading)
    outer.drop("type", "index")
    _, call_id = outer.first(CALL_ID_KEYS)
    function = outer.get("function")
    inner = Keys(function, CALL, reading) if isinstance(function, Mapping) else outer
    name = inner.get("name")
    if name is None and isinstance(function, str):
        name = function
    if not isinstance(name, str) or not name.strip():
        raise RowRefused(f"{CALL} has no name", code="call-without-name")
    _, arguments = inner.first(ARGUMENT_KEYS)
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        parse_json(arguments, f"the arguments of {name}")
    if arguments is None or arguments == "":  # a call without arguments
        arguments = {}
    arguments = plain_numbers(arguments)
    for keys in {id(outer): outer, id(inner): inner}.values():
        keys.close()
    made: dict[str, Any] = {"id": as_text(call_id, "the id of a tool call")} if call_id not in (None, "") else {}
    return made | {"type": "function", "function": {"name": name, "arguments": arguments}}


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool schemas as a list or JSON text, each in the form {"type": "function", "function": {...}}.

    Bare schemas are wrapped, Anthropic's input_schema becomes parameters, Gemini's functionDeclarations are expanded.
    """
    if is_missing(value) or (isinstance(value, (str, list, tuple, dict)) and not value):
        return ()
    loaded = parse_json(value, "tools")
    if isinstance(loaded, Mapping):
        loaded = [loaded]
    if not isinstance(loaded, list):
        raise RowRefused("tools is not a list of tool schemas", code="tools-not-list")
    schemas: list[dict[str, Any]] = []
    for tool in loaded:
        schemas += _parse_tool(plain_numbers(parse_json(tool, "tools")))
    for schema in schemas:
        name = schema["function"].get("name")
        if not isinstance(name, str) or not name.strip():
            raise RowRefused("a tool schema has no name", code="tool-without-name")
    return tuple(schemas)


def _parse_tool(tool: Any) -> list[dict[str, Any]]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function", tool), Mapping):
        raise RowRefused("tools is not a list of tool schemas", code="tools-not-list")
    for key in ("functionDeclarations", "function_declarations"):
        if isinstance(tool.get(key), list):
            if len(tool) > 1:
                raise RowRefused(
                    f"a tool has {key} and other keys ({', '.join(map(str, tool))})", code="tool-with-other-keys"
                )
            return [schema for declared in tool[key] for schema in _parse_tool(declared)]
    if "function" in tool:
        return [{"type": "function", **tool}]
    kind = tool.get("type")
    if "name" in tool and isinstance(kind, str) and kind not in ("function", "custom", "object"):
        raise RowRefused(
            f"a tool of type {kind!r} runs on its vendor's servers and has no schema. Remove it from the row's tools",
            code="tool-without-schema",
        )
    schema = {
        ("parameters" if key == "input_schema" and "parameters" not in tool else key): below
        for key, below in tool.items()
        if key != "type" or kind not in ("function", "custom")
    }
    return [{"type": "function", "function": schema}]
