"""Parse ChatGPT's data export (conversations.json): the last shown branch of each message tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.columns import Draft
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.tools import parse_tool_calls
from tunesmith.rows.values import as_text, json_type, show

ABOUT_THE_CHAT = (
    "title", "current_node", "plugin_ids", "conversation_template_id", "gizmo_id", "gizmo_type", "is_archived",
    "is_starred", "safe_urls", "blocked_urls", "moderation_results", "default_model_slug", "voice", "async_status",
    "disabled_tool_ids", "is_do_not_remember", "memory_scope", "sugar_item_id", "conversation_origin", "is_read_only",
)  # fmt: skip
"""Keys of an exported chat that are not messages."""
NOTE_INSTRUCTIONS = "was answered under custom instructions, which are not read"
NOTE_BRANCHES = "has branches other than the last one shown, which are not read"
NOTE_HIDDEN = "has hidden messages, which are left out"


def parse_chatgpt_export(keys: Keys, fields: FieldsSection) -> Draft:
    """{"mapping": {node: {"message", "parent"}}, "current_node"}."""
    mapping, current = keys.get("mapping"), keys.get("current_node")
    if not isinstance(mapping, Mapping):
        raise RowRefused("mapping must be an object of nodes. Use conversations.json as exported", code="export-broken")
    keys.drop(*ABOUT_THE_CHAT)
    messages: list[Message] = []
    thoughts = ""
    for number, value in enumerate(_branch(mapping, current, keys.reading)):
        try:
            message, thought = _read_node(value, keys)
        except RowRefused as refusal:
            raise RowRefused(f"turn {number}: {refusal.reason}", refusal.by_choice, code=refusal.code) from None
        thoughts += thought
        if message:
            if message.role == "assistant" and thoughts:
                message, thoughts = replace(message, reasoning_content=thoughts), ""
            messages.append(message)
    if not messages:
        raise RowRefused("has no messages. Remove the row", code="no-messages")
    return Draft(messages)


def _branch(mapping: Mapping[str, Any], current: Any, reading: Reading) -> list[Mapping[str, Any]]:
    """The messages from the root to the current node."""
    branch: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    while isinstance(current, str) and current in mapping and current not in seen:
        seen.add(current)
        node = mapping[current]
        if not isinstance(node, Mapping):
            raise RowRefused(f"node {current} is {json_type(node)}, not an object", code="export-broken")
        place = Keys(node, "a node", reading)
        place.drop("id", "children")
        message, current = place.get("message"), place.get("parent")
        place.close()
        if isinstance(message, Mapping):
            branch.append(message)
    if not seen:
        raise RowRefused("current_node is not a node of mapping", code="export-broken")
    if any(_has_message(node) for name, node in mapping.items() if name not in seen):
        reading.note(NOTE_BRANCHES)
    return branch[::-1]


def _has_message(node: Any) -> bool:
    return not isinstance(node, Mapping) or isinstance(node.get("message"), Mapping)


def _read_node(value: Mapping[str, Any], keys: Keys) -> tuple[Message | None, str]:
    """A node as a message or as reasoning; (None, "") for a hidden node."""
    node = Keys(value, "a message", keys.reading)
    said_by, content = node.get("author"), node.get("content")
    node.drop("status", "end_turn", "metadata", "recipient", "channel")
    if not isinstance(said_by, Mapping) or not isinstance(content, Mapping):
        raise RowRefused("has no author or no content", code="export-broken")
    author = Keys(said_by, "an author", keys.reading)
    role, speaker = author.get("role"), author.get("name")
    author.close()
    about = value.get("metadata")
    is_hidden = isinstance(about, Mapping) and about.get("is_visually_hidden_from_conversation") is True
    weight = node.get("weight")
    node.close()
    kind, text, thought = _read_body(content, keys)
    if is_hidden or kind in ("user_editable_context", "model_editable_context"):
        if text.strip() or kind == "user_editable_context":
            keys.reading.note(NOTE_INSTRUCTIONS if kind == "user_editable_context" else NOTE_HIDDEN)
        return None, ""
    if role not in ("system", "user", "assistant", "tool"):
        raise RowRefused(f"unknown role {show(role)}", code="unknown-role")
    if not text.strip() and role != "user":
        return None, thought
    name = as_text(speaker, "name") or None
    to = value.get("recipient")
    if role == "assistant" and isinstance(to, str) and to != "all":
        calls = parse_tool_calls({"name": to, "arguments": text}, keys.reading)
        return Message(role, "", tool_calls=calls, is_trained=weight != 0, name=name), thought
    return Message(role, text, is_trained=weight != 0, name=name), thought


def _read_body(content: Mapping[str, Any], keys: Keys) -> tuple[Any, str, str]:
    """Type, text and thought of a message's content."""
    body = Keys(content, "a content", keys.reading)
    kind = body.get("content_type")
    body.drop("language", "response_format_name", "source_analysis_msg_id", "assets")
    if kind in ("user_editable_context", "model_editable_context", "reasoning_recap", "system_error"):
        return kind, "", ""
    if kind == "thoughts":
        thoughts = body.get("thoughts")
        items = thoughts if isinstance(thoughts, list) else []
        texts = [as_text(t.get("content"), "a thought") for t in items if isinstance(t, Mapping)]
        body.close()
        return kind, "", "\n".join(texts)
    if kind not in ("text", "code", "execution_output"):
        raise RowRefused(f"has content of type {show(kind)}; tunesmith trains on text only", code="media-not-supported")
    parts = body.get("parts")
    if isinstance(parts, list):
        if not all(isinstance(part, str) for part in parts):
            raise RowRefused("has a part that is not text; tunesmith trains on text only", code="media-not-supported")
        text = "".join(parts)
    else:
        text = as_text(body.get("text"), "content")
    body.close()
    return kind, text, ""
