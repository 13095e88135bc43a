"""A reply's reasoning, content and tool calls: what each template writes is read back, whole and in pieces."""

from __future__ import annotations

import datetime
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED
from tunesmith.chat_template.habits import TemplateRefused, shared_length
from tunesmith.chat_template.template import ChatTemplate, Renderer, RenderSettings
from tunesmith.generation.reply_parts import ReplyFormat, ReplyParts, ReplyReader, join_parts
from tunesmith.generation.reply_shapes import find_reply_shapes
from tunesmith.rows.conversation import Message

HERE = Path(__file__).parent / "templates"
PATHS = sorted(HERE.rglob("*.jinja")) + sorted((SHARED / "templates").rglob("*.jinja") if SHARED.is_dir() else [])
STOPS = (
    "<|im_end|>", "</s>", "<|end|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>", "<｜end｜>", "<|stop|>",
    "<|close|>", "<|/role|>", "<|eot|>", "<|/turn|>", "<end_of_turn>", "<|END_RESPONSE|>", "<|end_of_text|>", "<|call|>",
)  # fmt: skip
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "x"},
                    "any": {"description": "y"},
                    "digits": {"type": "string"},
                    "flag": {"type": "boolean"},
                    "none": {"type": ["null", "string"]},
                    "count": {"type": "integer"},
                },
            },
        },
    }
    for name in ("get_weather", "ns.other-tool")
]
ARGUMENTS: list[dict[str, Any]] = [
    {"city": 'it\'s "q" <b>\nline {x} [y]', "any": {"k": [True, None, 1.5, "ü你"]}},
    {},
    {"digits": "7", "flag": True, "none": None, "count": 12},
    {"city": "</think> ok"},
]
CALLS = [
    [],
    [("get_weather", ARGUMENTS[0])],
    [("get_weather", ARGUMENTS[1])],
    [("ns.other-tool", ARGUMENTS[2])],
    [("get_weather", ARGUMENTS[0]), ("ns.other-tool", ARGUMENTS[2])],
    [("get_weather", ARGUMENTS[1]), ("ns.other-tool", ARGUMENTS[0]), ("get_weather", ARGUMENTS[3])],
]


def renderer_of(text: str) -> Renderer:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(text, "a test's", special).with_settings(RenderSettings(datetime.datetime(2026, 1, 2)))


def stops_of(renderer: Renderer) -> list[str]:
    text = renderer.render([Message("user", "a"), Message("assistant", "tsX")], SCHEMAS)
    tail = text[text.rindex("tsX") :]
    is_last = "<|call|>" in renderer.template.text and "<|message|>" in renderer.template.text  # gpt-oss
    return [stop for stop in STOPS if stop in tail and stop != "<|call|>"] + ["<|call|>"] * is_last


def reply_of(renderer: Renderer, message: Message, stops: list[str]) -> str:
    """What a model is trained to write for a message, without its stop token."""
    asked = [Message("user", "Hi")]
    prompt, text = renderer.render(asked, SCHEMAS, True), renderer.render([*asked, message], SCHEMAS)
    bare = renderer.render([*asked, Message("assistant", "tsX")], SCHEMAS)
    start = min(shared_length(bare, prompt), shared_length(text, prompt))
    reply = text[start:]
    if start < len(prompt):
        reply = reply.removeprefix(prompt[prompt.rindex("assistant:") :] if "assistant:" in prompt else "")
        if prompt.rstrip().endswith("<think>"):
            reply = f"thought</think>{reply}"
    ends = [reply.rindex(stop) if stop == "<|end|>" else reply.index(stop) for stop in stops if stop in reply]
    return reply[: min(ends, default=len(reply))]


def in_pieces(form: ReplyFormat, reply: str, seed: int, **options: Any) -> ReplyParts:
    sizes, reader, parts, at = random.Random(seed), ReplyReader(form, **options), [], 0
    while at < len(reply):
        size = sizes.choice([1, 1, 2, 3, 7, 20])
        parts += reader.push(reply[at : at + size])
        at += size
    return join_parts([*parts, *reader.finish()])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_a_template_writes_is_read_back(path: Path) -> None:
    renderer = renderer_of(path.read_text(encoding="utf-8"))
    try:
        stops = stops_of(renderer)
    except TemplateRefused:
        pytest.skip("the template renders no chat of one question")
    form, habits = ReplyFormat(find_reply_shapes(renderer, stops)), renderer.habits
    assert form.writes_calls == habits.writes_calls
    for words, thought, calls in itertools.product(("", "Some words.\n\nMore."), (None, "I think\n\nso."), CALLS):
        if not (words or calls) or (calls and not habits.writes_calls):
            continue
        made = tuple(
            {"id": f"tsmith00{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(calls)
        )
        try:
            reply = reply_of(renderer, Message("assistant", words, thought, made), stops)
        except TemplateRefused:
            continue
        parts = form.parse(reply, True, SCHEMAS)
        is_written = "Some words." in reply  # some templates write either words or calls
        if "analysis<|message|>Some words." in reply:  # gpt-oss writes words before a call as reasoning
            assert (parts.content, parts.reasoning) == ("", words)
        else:
            assert parts.content.rstrip(" ") == (words if is_written else ""), reply  # Llama 2 has a space there
            assert parts.reasoning in ("thought", (thought or "") if "I think" in reply else ""), reply
        # some templates write no calls beside words, one call only, or not all before the stop token
        wanted = calls[: sum(reply.count(name) for name in ("get_weather", "ns.other-tool"))]
        assert [(call.name, call.arguments) for call in parts.tool_calls] == wanted, reply
        assert [call.arguments for call in parts.tool_calls] == [json.loads(call.text) for call in parts.tool_calls]
        for seed in range(3):
            assert in_pieces(form, reply, seed, tools=SCHEMAS) == parts
        for end in range(0, len(reply), 5):  # cut off anywhere
            assert in_pieces(form, reply[:end], end, tools=SCHEMAS) == form.parse(reply[:end], True, SCHEMAS)


def chat_of(calls: str) -> str:
    """A template that writes calls by this piece of Jinja."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}" + calls + "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


OTHERS = {
    "wrapped in a function": "{% for c in m.tool_calls %}<call>{{ {'type': 'function', 'function': c.function} | tojson }}</call>{% endfor %}",
    "arguments first": '{% for c in m.tool_calls %}<call>{"arguments": {{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}</call>{% endfor %}',
    "python": "{{ '\n[' }}{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]",
    "own quotes": "{% for c in m.tool_calls %}<start_call>call:{{ c.function.name }}{{ '{' }}{% for k, v in c.function.arguments.items() %}{{ k }}:{% if v is string %}<escape>{{ v }}<escape>{% else %}{{ v | tojson }}{% endif %}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<end_call>{% endfor %}",
    "semicolons": "<|tool|>{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}; {% endif %}{% endfor %}",
    "attributes": '{% for c in m.tool_calls %}<invoke name="{{ c.function.name }}">{% for k, v in c.function.arguments.items() %}<arg name="{{ k }}">{{ v if v is string else v | tojson }}</arg>{% endfor %}</invoke>{% endfor %}',
}


@pytest.mark.parametrize("calls", OTHERS.values(), ids=OTHERS)
def test_other_ways_to_write_calls(calls: str) -> None:
    renderer = renderer_of(chat_of(calls))
    form = ReplyFormat(find_reply_shapes(renderer, ["<|im_end|>"]))
    for words, wanted in itertools.product(("", "Some words."), CALLS[1:]):
        made = tuple(
            {"id": "tsmith001", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in wanted
        )
        reply = reply_of(renderer, Message("assistant", words, None, made), ["<|im_end|>"])
        parts = form.parse(reply, True, SCHEMAS)
        assert (parts.content, [(call.name, call.arguments) for call in parts.tool_calls]) == (words, wanted), reply
        for seed in range(5):
            assert in_pieces(form, reply, seed, tools=SCHEMAS) == parts


QWEN = (
    '{% for c in m.tool_calls %}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen() -> ReplyFormat:
    return ReplyFormat(find_reply_shapes(renderer_of(chat_of(QWEN)), ["<|im_end|>"]))


@pytest.mark.parametrize(
    ("reply", "content", "calls"),
    [
        ('<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name":"f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name":"f","id":3,"arguments":{}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":{"a": [1, {"b": "}"', "", [("f", '{"a": [1, {"b": "}"')]),
        ('<tool_call>{"name":"f","arguments":{"a" 1}}</tool_call>', "", [("f", '{"a" 1}')]),
        (
            'Hi <tool_call>{"name": 3, "arguments": {}}</tool_call>',
            'Hi <tool_call>{"name": 3, "arguments": {}}</tool_call>',
            [],
        ),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ("<tool_call>", "<tool_call>", []),
        ('<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        (
            'A <tool_ca b <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\nbye',
            "A <tool_ca bbye",
            [("f", "{}")],
        ),
        ("\n" * 500 + "x", "\n" * 500 + "x", []),
    ],
)
def test_what_models_write_besides(qwen: ReplyFormat, reply: str, content: str, calls: list[tuple[str, str]]) -> None:
    parts = qwen.parse(reply)
    assert [(call.name, call.text) for call in parts.tool_calls] == calls
    assert parts.content == content
    for seed in range(8):
        assert in_pieces(qwen, reply, seed) == parts


def test_without_tools_a_call_is_content(qwen: ReplyFormat) -> None:
    reply = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert qwen.parse(reply, has_tools=False) == ReplyParts("", reply, [])


def test_arguments_come_as_they_are_written(qwen: ReplyFormat) -> None:
    reader = ReplyReader(qwen)
    assert reader.push('Look:\n<tool_call>\n{"name": "f", "argu')[0].text == "Look:"
    kinds = [(part.kind, part.text) for part in reader.push('ments": {"city": "Os')]
    assert kinds == [("call", "f"), ("arguments", '{"city": "Os')]
    assert [part.text for part in reader.push('lo"}')] == ['lo"}', ""]


def test_a_long_reply_is_read_in_linear_time(qwen: ReplyFormat) -> None:
    import time

    took = []
    for size in (2_000, 8_000):
        start = time.perf_counter()
        in_pieces(qwen, "\n <tool_call> {" + "\n {[" * (size // 4), 0)
        took.append(time.perf_counter() - start)
    assert took[1] < 12 * took[0] + 0.5
