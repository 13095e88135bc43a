"""Parse turns of a chat, in the key names of all common tools, into messages and tool schemas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tunesmith.rows.conversation import Message, RowRefused, UnknownFormat
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.parts import Content, as_json, is_object, read_content
from tunesmith.rows.tools import parse_tool_calls, parse_tools
from tunesmith.rows.values import as_text, is_missing, json_type, show

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
TRAIN_KEYS = ("loss_weight", "weight", "train", "training", "trainable", "loss")
DETAIL_KEYS = ("train_detail", "training_detail")
CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # the content is the call (ShareGPT, ms-swift)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
}
ITEM_TYPES = {"function_call": "tool_call", "function_call_output": "tool", "reasoning": "assistant"}
"""Items of OpenAI's Responses API that have a type instead of a role."""
TYPE_ROLES = ("system", "human", "ai", "tool")
"""Types of LangChain's messages, which have no role."""
SWITCHES = ("on", "off", "true", "false", "none", "auto", "low", "medium", "high")
"""Values of a reasoning column that are settings (Nemotron), not reasoning."""
SWITCH_KEYS = {"type", "enabled", "effort", "budget_tokens", "max_tokens", "summary", "generate_summary", "exclude"}
"""Keys of reasoning settings in a request (OpenAI, Anthropic)."""
TURN = "a turn"
NOTE_USER_TRAINED = "has train true on a turn that is not the assistant's; the turn stays context"
_PLAIN = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True, slots=True)
class Turn:
    """A parsed turn.

    Attributes:
        messages: one; several where the turn has tool results beside text.
        tools: schemas in the turn (MiniMind's system turn).
        joins_next: a tool call or reasoning that forms one reply with the next turn.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    joins_next: bool = False


def parse_turns(
    turns: list[Any], reading: Reading, role_key: str | None = None, content_key: str | None = None
) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Messages of a chat, and the tool schemas found in its turns."""
    if not turns:
        raise RowRefused("the list of turns is empty. Remove the row", code="no-turns")
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    is_open = False
    for number, value in enumerate(turns):
        try:
            turn = parse_turn(value, reading, role_key, content_key)
            if turn.tools:
                if tools and tools != turn.tools:
                    raise RowRefused("has different tools than an earlier turn", code="tools-differ")
                tools = turn.tools
        except RowRefused as refusal:
            raise type(refusal)(f"turn {number}: {refusal.reason}", refusal.by_choice, code=refusal.code) from None
        _append(messages, turn, is_open)
        is_open = turn.joins_next
    return messages, tools


def _append(messages: list[Message], turn: Turn, is_open: bool) -> None:
    """Add a turn; separate turns with tool calls or reasoning are joined into one reply."""
    first = turn.messages[0]
    last = messages[-1] if messages else None
    can_join = turn.joins_next or (last is not None and not last.tool_calls)
    if is_open and last and can_join and first.role == "assistant" and first.is_trained == last.is_trained:
        thoughts = [m.reasoning_content for m in (last, first) if m.reasoning_content]
        messages[-1] = replace(
            first,
            content=last.content + first.content,
            reasoning_content="\n".join(thoughts) or None,
            tool_calls=last.tool_calls + first.tool_calls,
            name=first.name or last.name,
        )
        messages += turn.messages[1:]
    else:
        messages += turn.messages


def parse_turn(turn: Any, reading: Reading, role_key: str | None = None, content_key: str | None = None) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowRefused(f"is {json_type(turn)}, not an object with role and content", code="turn-not-object")
    keys = Keys(turn, TURN, reading)
    said_role, role = _read_role(keys, role_key)
    content_keys = (content_key,) if content_key else CONTENT_KEYS
    if turn.keys() in _PLAIN and not content_key and said_role not in CALL_ROLES:
        text = turn.get("content", turn.get("value"))
        if isinstance(text, str):
            return Turn([Message(role, text)])
    if not any(key in turn for key in (*content_keys, *_stand_ins(turn))):
        raise _missing_key("content", content_key, turn)
    turned = _read_turn(keys, said_role, role, content_keys, reading)
    keys.close()
    return turned


def _stand_ins(turn: Mapping[str, Any]) -> list[str]:
    """Keys with a value that can replace content."""
    names = ("tool_calls", "tools", "function_call", *REASONING_KEYS)
    is_item = turn.get("type") in ITEM_TYPES if isinstance(turn.get("type"), str) else False
    return [name for name in names if turn.get(name)] + (["type"] if is_item else [])


def _read_role(keys: Keys, role_key: str | None) -> tuple[str, str]:
    """The role as written in the turn (lower case), and the standard role it maps to."""
    _, said = keys.first((role_key,) if role_key else ROLE_KEYS)
    if said is None and not role_key:
        kind = keys.values.get("type")
        said = ITEM_TYPES.get(kind, kind if kind in TYPE_ROLES else None) if isinstance(kind, str) else None
    if said is None:
        raise _missing_key("role", role_key, keys.values)
    name = normal_role(said)
    role = ROLES.get(name)
    if role is None:
        raise RowRefused(
            f"unknown role {show(said)}; known: {', '.join(ROLES)}. Use one of these, or name the key of the role with "
            "--data.fields.role",
            code="unknown-role",
        )
    return name, role


def normal_role(said: Any) -> str:
    """A role normalized as in ROLES ("Human", "function-call"), "" if it is not text."""
    return said.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(said, str) else ""


def _missing_key(part: str, mapped: str | None, turn: Mapping[str, Any]) -> RowRefused:
    """The error for a missing key; a missing mapped key is a mistake of the command, not of one row."""
    reason = f"has no {mapped or part} (keys found: {', '.join(map(str, turn))}). Name it with --data.fields.{part}"
    return UnknownFormat(reason, code="turn-key-missing") if mapped else RowRefused(reason, code="turn-key-missing")


def _read_turn(keys: Keys, said_role: str, role: str, content_keys: tuple[str, ...], reading: Reading) -> Turn:
    kind = keys.get("type")
    is_item = isinstance(kind, str) and kind in ITEM_TYPES and not any(key in keys.values for key in ROLE_KEYS)
    tools = parse_tools(keys.get("tools"))
    is_trained = read_flag(keys, TRAIN_KEYS, role)
    reasoning = read_reasoning(keys, REASONING_KEYS)
    name = as_text(keys.get("name"), "name") or None if said_role not in CALL_ROLES else None
    if is_item and said_role == "tool_call":
        calls = parse_tool_calls(keys.values, reading)
        keys.drop(*keys.values)
        return Turn([Message("assistant", "", reasoning, calls, is_trained)], tools, joins_next=True)
    if is_item:
        content_keys = (*content_keys, "output", "summary")
    _, value = keys.first(content_keys)
    if said_role in CALL_ROLES:
        calls = parse_tool_calls(value, reading)
        return Turn([Message("assistant", "", reasoning, calls, is_trained)], tools, joins_next=True)
    content = Content([as_json(value)]) if role == "tool" and is_object(value) else read_content(value, reading)
    calls = content.calls + _read_calls(keys, reading)
    thoughts = _join_thoughts(reasoning, content)
    if role != "assistant" and (calls or thoughts):
        what = "tool calls" if calls else "reasoning"
        raise RowRefused(f"a {role} turn has {what}; only assistant turns may have them", code="call-outside-reply")
    if content.results and role == "assistant":
        raise RowRefused(
            "an assistant turn has a tool result; put it into a turn of role tool", code="result-inside-reply"
        )
    spans = _read_details(keys, content.text, role)
    if spans and spans == ((0, len(content.text)),):
        spans, is_trained = (), False
    _, call_id = keys.first(("tool_call_id", "tool_use_id", "call_id"))
    message = Message(
        role, content.text, thoughts, calls, is_trained, name, as_text(call_id, "tool_call_id") or None, spans
    )
    return Turn(_with_results(message, content), tools, joins_next=is_item and bool(thoughts) and not content.text)


def _with_results(message: Message, content: Content) -> list[Message]:
    """Tool results inside a user or tool turn (Anthropic, Gemini) as separate turns before its text."""
    results = [
        Message("tool", r.text, name=r.name or message.name, tool_call_id=r.call_id or message.tool_call_id)
        for r in content.results
    ]
    return [*results, message] if not results or message.content.strip() else results


def _read_calls(keys: Keys, reading: Reading) -> tuple[dict[str, Any], ...]:
    """OpenAI's tool_calls, and its older function_call beside content."""
    calls: tuple[dict[str, Any], ...] = ()
    for key in ("tool_calls", "function_call"):
        value = keys.get(key)
        if value not in (None, "", [], {}, "[]", "null"):
            calls += parse_tool_calls(value, reading)
    return calls


def read_reasoning(keys: Keys, names: tuple[str, ...]) -> str | None:
    """The reasoning of a reply, from the first of these keys that has it.

    Raises:
        RowRefused: two keys have different reasoning.
    """
    found: dict[str, str] = {}
    for key in names:
        if key not in keys.values:
            continue
        value = keys.get(key)
        if _is_switch(value):
            keys.reading.note(f"{key} is {show(value)}, a setting and not reasoning; it is not read")
            continue
        text = "\n".join(value) if is_lines(value) else as_text(value, key)
        if text.strip():
            found[key] = text
    if len(set(found.values())) > 1:
        raise RowRefused(f"{' and '.join(found)} differ; keep one of them", code="reasoning-differs")
    return next(iter(found.values()), None)


def _is_switch(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and value.keys() <= SWITCH_KEYS
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in SWITCHES)


def is_lines(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def _join_thoughts(reasoning: str | None, content: Content) -> str | None:
    in_parts = "".join(content.reasoning)
    if not reasoning or not in_parts.strip():
        return reasoning or in_parts or None
    if reasoning.strip() != in_parts.strip():
        raise RowRefused(
            "its reasoning differs from the reasoning in its parts; keep one of them", code="reasoning-differs"
        )
    return reasoning


def read_flag(keys: Keys, names: tuple[str, ...], role: str) -> bool:
    """Whether a turn is trained: a weight of 0 or 1, or a bool. Other weights refuse the row."""
    said: dict[str, bool] = {}
    for key in names:
        if key not in keys.values:
            continue
        weight = keys.get(key)
        if is_missing(weight):
            continue
        if not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise RowRefused(
                f"{key} is {show(weight)}; only 0 (not trained) and 1 (trained) are allowed", code="weight-not-binary"
            )
        if role != "assistant" and weight == 1:
            if key != "train":  # some files write it on every turn
                raise RowRefused(
                    f"a {role} turn has {key} 1, but only assistant turns are trained", code="flag-outside-reply"
                )
            keys.reading.note(NOTE_USER_TRAINED)
        said[key] = bool(weight)
    if len(set(said.values())) > 1:
        raise RowRefused(
            f"{' and '.join(said)} differ; keep the one that decides whether the turn is trained", code="flags-differ"
        )
    return next(iter(said.values()), True)


def _read_details(keys: Keys, text: str, role: str) -> tuple[tuple[int, int], ...]:
    """Axolotl's train_detail: characters of the content that are context. end_offset is the last character."""
    name, details = keys.first(DETAIL_KEYS)
    if not details:
        return ()
    if role != "assistant":
        raise RowRefused(f"a {role} turn has {name}, but only assistant turns are trained", code="flag-outside-reply")
    if not isinstance(details, list) or not all(isinstance(detail, Mapping) for detail in details):
        raise RowRefused(
            f"{name} is not a list of objects with begin_offset, end_offset and train", code="details-malformed"
        )
    spans = []
    for detail in details:
        inner = Keys(detail, name, keys.reading)
        begin, end, is_trained = inner.get("begin_offset"), inner.get("end_offset"), inner.get("train")
        inner.close()
        if not isinstance(begin, int) or not isinstance(end, int) or not isinstance(is_trained, bool):
            raise RowRefused(
                f"{name} needs integers begin_offset and end_offset, and train true or false", code="details-malformed"
            )
        if not 0 <= begin <= end < len(text):
            raise RowRefused(
                f"{name} has offsets {show(begin)} to {show(end)}, outside the {len(text)} characters of the content",
                code="details-out-of-range",
            )
        spans.append((begin, end + 1, is_trained))
    spans.sort()
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        raise RowRefused(f"{name} has overlapping spans", code="details-overlap")
    return _joined([(begin, end) for begin, end, is_trained in spans if not is_trained])


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Adjacent spans merged."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)
