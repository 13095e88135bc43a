"""<think> and <tool_call> blocks in an assistant's text become fields where the template supports these."""

from __future__ import annotations

import datetime

import pytest

from tunesmith.chat_template.template import ChatTemplate, RenderSettings
from tunesmith.encode.blocks import read_blocks
from tunesmith.rows.conversation import Message

KNOWS = (
    "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }} {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>{% endfor %}"
)


def read(content: str, template: str = KNOWS, role: str = "assistant") -> Message:
    renderer = ChatTemplate(template, "test", {}).with_settings(RenderSettings(datetime.datetime(2026, 1, 2)))
    return read_blocks([Message("user", "Q"), Message(role, content)], renderer.habits)[1]


def test_a_leading_think_block_is_the_reasoning() -> None:
    message = read("<think>\nWhy not.\nSo.\n</think>\n\nYes.")
    assert (message.reasoning_content, message.content) == ("Why not.\nSo.", "Yes.")
    assert read("<think>\n\n</think>\n\nYes.").reasoning_content is None
    assert read("<think>\n\n</think>\n\nYes.").content == "Yes."


@pytest.mark.parametrize(
    "text",
    ["so <think>a</think> b", "<think>never closed", "a</think>b", "<think>a<think>b</think>c", "<tool_call>{bad</tool_call>",
     '<tool_call>{"no": "name"}</tool_call>', 'say <tool_call>{"name": "f"}</tool_call> inside'],
)  # fmt: skip
def test_everything_else_is_text(text: str) -> None:
    message = read(text)
    assert (message.content, message.reasoning_content, message.tool_calls) == (text, None, ())


def test_other_roles_and_templates_without_a_place_keep_their_text() -> None:
    text = "<think>a</think>b"
    assert read(text, role="user").content == text
    assert read(text, template="{{ m.content }}").content == text


def test_tool_calls_at_the_end() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {"x": {"y": 1}}}\n</tool_call>'
    message = read(f"Let me look.\n{one}\n{one}")
    assert message.content == "Let me look."
    assert [c["function"] for c in message.tool_calls] == [{"name": "f", "arguments": {"x": {"y": 1}}}] * 2
