"""Read <think> and <tool_call> blocks in an assistant's text into the message's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from tunesmith.chat_template.habits import Habits
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.rows.tools import parse_tool_calls

_THINK = re.compile(r"\s*<think>\n?(?P<reasoning>.*?)\n?</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_CALLS_AT_END = re.compile(r"(?:\s*<tool_call>\s*\{(?:(?!</?tool_call>).)*\}\s*</tool_call>)+\s*\Z", re.DOTALL)


def read_blocks(messages: Sequence[Message], habits: Habits) -> tuple[Message, ...]:
    """Parse assistant turns with a leading well-formed <think> block, or whole <tool_call> blocks at their end.

    Done only where the template writes such fields, or its generation prompt opens the thinking; elsewhere the blocks
    are trained as text.

    Raises:
        RowRefused: reasoning is part of a prefill.
    """
    if not any(m.role == "assistant" and ("<think>" in m.content or "<tool_call>" in m.content) for m in messages):
        return tuple(messages)
    thinks, calls = habits.writes_reasoning or habits.opens_thinking, habits.writes_calls
    if not thinks and not calls:
        return tuple(messages)
    return tuple(_read_turn(message, thinks, calls) if message.role == "assistant" else message for message in messages)


def _read_turn(message: Message, thinks: bool, calls: bool) -> Message:
    text = message.content
    if thinks and "<think>" in text and not message.reasoning_content and (found := _THINK.match(text)):
        reasoning = found["reasoning"]
        if "<think>" not in reasoning:
            if _is_context(message, 0, found.end()):
                raise RowRefused(
                    "has reasoning in its prefill, which this template writes separately. Move it into the trained "
                    "part of the reply",
                    code="thoughts-in-prefill",
                )
            message = _cut(replace(message, reasoning_content=reasoning.strip() or None), found.end(), len(text))
    if calls and "<tool_call>" in text and not message.tool_calls and (found := _CALLS_AT_END.search(message.content)):
        try:
            parsed = [call for block in _CALL.findall(found[0]) for call in parse_tool_calls(json.loads(block))]
        except (json.JSONDecodeError, RowRefused):
            return message  # not a call, so it stays text
        if _is_context(message, found.start(), len(message.content)):
            return message
        message = _cut(replace(message, tool_calls=tuple(parsed)), 0, len(message.content[: found.start()].rstrip()))
    return message


def _is_context(message: Message, start: int, end: int) -> bool:
    """Whether these characters of the content are untrained, which a separate field could not express."""
    return any(a < end and b > start for a, b in message.context_spans)


def _cut(message: Message, start: int, end: int) -> Message:
    """The message with only these characters of its content, and its context spans shifted accordingly."""
    spans = ((max(a, start) - start, min(b, end) - start) for a, b in message.context_spans)
    kept = tuple((a, b) for a, b in spans if a < b)
    return replace(message, content=message.content[start:end], context_spans=kept)
