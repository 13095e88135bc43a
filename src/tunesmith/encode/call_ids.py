"""Add ids to tool calls without one, for templates that require them (Mistral, nine characters)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.rows.conversation import Conversation, Message

NOTE_IDS = "its tool calls got ids, which the template requires and the row lacks"
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LENGTH = 9


def add_call_ids(conversation: Conversation) -> Conversation:
    """The conversation with an id on every tool call, and on every tool turn the id of the call that it answers.

    An id is derived from the call's position and contents, so that it is the same in every run. The row's ids stay.
    """
    messages: list[Message] = []
    open_ids: list[str] = []
    for turn, message in enumerate(conversation.messages):
        if message.tool_calls:
            calls = tuple(_with_id(call, turn, number) for number, call in enumerate(message.tool_calls))
            open_ids = [str(call["id"]) for call in calls]
            message = replace(message, tool_calls=calls)
        elif message.role == "tool":
            message, open_ids = _answer(message, open_ids)
        messages.append(message)
    return replace(conversation, messages=tuple(messages), notes=(*conversation.notes, NOTE_IDS))


def lacks_call_ids(conversation: Conversation) -> bool:
    return any("id" not in call for message in conversation.messages for call in message.tool_calls) or any(
        message.role == "tool" and not message.tool_call_id for message in conversation.messages
    )


def _with_id(call: dict[str, Any], turn: int, number: int) -> dict[str, Any]:
    if "id" in call:
        return call
    digest = hashlib.blake2b(f"{turn} {number} {call['function']}".encode("utf-8", "surrogatepass")).digest()
    return {"id": "".join(_DIGITS[byte % len(_DIGITS)] for byte in digest[:_LENGTH]), **call}


def _answer(message: Message, open_ids: Sequence[str]) -> tuple[Message, list[str]]:
    """A tool turn with the id of the first call that is still unanswered, and the remaining open ids."""
    if message.tool_call_id:
        return message, [call_id for call_id in open_ids if call_id != message.tool_call_id]
    if not open_ids:
        return message, []
    return replace(message, tool_call_id=open_ids[0]), [*open_ids[1:]]
