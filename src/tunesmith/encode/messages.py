"""Prepare conversations for rendering: blocks, call ids and control text; the same for rows and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.chat_template.habits import Habits
from tunesmith.encode import disguise
from tunesmith.encode.blocks import read_blocks
from tunesmith.encode.call_ids import add_call_ids, lacks_call_ids
from tunesmith.encode.shield import Shield
from tunesmith.rows.conversation import Conversation, Message, RowRefused

NOTE_CONTROL = "spells control tokens in its text, kept as plain text (other programs may encode control tokens)"
NOTE_CONTROL_ALLOWED = "spells control tokens in its text, which become these tokens (data.control_text allow)"
REFUSED_CONTROL = "spells a control token in its text (data.control_text refuse)"


def prepare_messages(
    chat: Conversation | Sequence[Message],
    habits: Habits | None,
    shield: Shield,
    control_text: str = "plain",
    tools: Sequence[dict[str, Any]] = (),
) -> Conversation:
    """The conversation with blocks parsed, call ids added and control text marked, ready for `Renderer`.

    Args:
        chat: a row's conversation, or the messages to answer, with `tools`.
        habits: of the chat template; None if there is no template.
        control_text: data.control_text.

    Raises:
        RowRefused: control text under data.control_text refuse, a spelling that marks do not break up, or reasoning
            in a prefill.
    """
    conversation = chat if isinstance(chat, Conversation) else Conversation(tuple(chat), tuple(tools))
    if habits is not None:
        messages = read_blocks(conversation.messages, habits)
        if any(message.tool_calls for message in messages):
            messages = tuple(map(habits.call_form.with_arguments, messages))
        if messages is not conversation.messages:
            conversation = replace(conversation, messages=messages)
        if habits.needs_ids and lacks_call_ids(conversation):
            conversation = add_call_ids(conversation)
    try:
        marked, is_marked = shield.mark_conversation(conversation)
    except RowRefused as refusal:
        if control_text != "allow" or refusal.code != disguise.CODE:
            raise
        marked, is_marked = conversation, True
    if not is_marked:
        return conversation
    if control_text == "allow":
        return replace(conversation, notes=(*conversation.notes, NOTE_CONTROL_ALLOWED))
    if control_text == "refuse":
        raise RowRefused(REFUSED_CONTROL, code="control-text")
    return replace(marked, notes=(*conversation.notes, NOTE_CONTROL))


def prepare_text(text: str, shield: Shield, control_text: str) -> tuple[str, tuple[str, ...]]:
    """A raw text with its control text marked, and its notes.

    Raises:
        RowRefused: as `prepare_messages`.
    """
    marked = shield.mark(text)
    if marked == text:
        return text, ()
    if control_text == "allow":
        return text, (NOTE_CONTROL_ALLOWED,)
    if control_text == "refuse":
        raise RowRefused(REFUSED_CONTROL, code="control-text")
    return marked, (NOTE_CONTROL,)
