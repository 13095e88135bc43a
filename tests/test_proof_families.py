"""Problems found in an audit of real templates, each on a small template with the same habit."""

from __future__ import annotations

from typing import Any

import pytest

from proof_shapes import CLOCK, ID, OSLO, WEATHER, call, tool
from test_labels import trained_texts
from test_matrix import SYSTEM, a, u
from test_proof_matrix import find_wrong
from test_proof_trace import Row, label, open_encoder

_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_OPEN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
_CLOSE = "{{ '<|im_end|>\n' }}{% endfor %}"
_CALLS = "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
_TOOLS = "{% for t in tools or [] %}{{ t | tojson + '\n' }}{% endfor %}"

NO_SCHEMAS = _OPEN + "{{ m.content }}" + _CALLS + _CLOSE + _ASK
NO_CALLS = _TOOLS + _OPEN + "{{ m.content }}" + _CLOSE + _ASK
QUOTES = _TOOLS + _OPEN + "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}" + _CALLS + _CLOSE + _ASK
HARMONY = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}{{ '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' + (c.arguments | tojson) + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)  # fmt: skip
R1 = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% for c in m.tool_calls or [] %}{{ '<|Assistant|><|calls|>' + c.function.name + '\n' + (c.function.arguments | tojson) + '<|eos|>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)  # fmt: skip
GLM = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% else %}{{ '</think>' }}{% endif %}{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '<arg_key>' + k + '</arg_key><arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)  # fmt: skip
SMOL = (
    _OPEN + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% else %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    + _CLOSE + _ASK
)  # fmt: skip
APERTUS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant_start|>' + m.content }}{% if not loop.last %}{{ '<|assistant_end|>' }}{% endif %}"
    "{% else %}{{ '<|' + m.role + '_start|>' + m.content + '<|' + m.role + '_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)  # fmt: skip
MENTIONS = (
    "{{ '<|im_start|>system\nThink between <think> and </think>.<|im_end|>\n' }}"
    + _OPEN
    + "{{ m.content }}"
    + _CLOSE
    + _ASK
)
SHUTS = (  # SmolLM3's /no_think
    "{{ '<|im_start|>system\nThink between <think> and </think>.<|im_end|>\n' }}" + _OPEN
    + "{{ ('<think>\n\n</think>\n' if m.role == 'assistant' else '') + m.content }}" + _CLOSE + _ASK.replace("assistant\n", "assistant\n<think>\n\n</think>\n")
)  # fmt: skip
FIRST = "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% set messages = messages[1:] %}{% endif %}{{ '<s>' if messages[0].role == 'user' else '' }}" + _OPEN + "{{ m.content }}" + _CLOSE + _ASK  # fmt: skip
NO_PLACE = _OPEN + "{{ m.content }}" + _CLOSE + _ASK


def chat_with_call(content: str = "", thought: str = "") -> Row:
    said = a(content, tool_calls=[call("get_weather", OSLO, ID)], **({"reasoning_content": thought} if thought else {}))
    return {"messages": [u("Rain?"), said, tool("wet", ID), a("It rains.")], "tools": [WEATHER]}


def trained(tokenizer: Any, template: str, row: Row, **data: Any) -> list[str] | str:
    """The trained texts, verified; or the code and reason of the refusal."""
    own, encoder = open_encoder(tokenizer, template)
    labelled = label(encoder, row, **data)
    if labelled.status == "refused":
        return f"{labelled.code}: {labelled.reason}"
    if not data:
        assert not list(find_wrong(own, encoder, row, labelled))
    return trained_texts(encoder, labelled)


def is_lost(found: list[str] | str, code: str, name: str = "") -> bool:
    """Whether the row was refused with this code, and the reason names this part of it."""
    return isinstance(found, str) and found.startswith(f"{code}: ") and name in found


def test_a_schema_is_not_written_because_a_call_names_its_tool(tokenizer: Any) -> None:
    assert is_lost(trained(tokenizer, NO_SCHEMAS, chat_with_call()), "context-lost", "get_weather")
    two = {**chat_with_call(), "tools": [WEATHER, CLOCK]}
    once = NO_SCHEMAS.replace("{% for m", "{% if tools %}{{ tools[0] | tojson }}{% endif %}{% for m", 1)
    assert is_lost(trained(tokenizer, once, two), "context-lost", "read_clock")


def test_a_call_is_not_written_because_the_content_names_it(tokenizer: Any) -> None:
    row = chat_with_call('I call get_weather with {"city": "Oslo"}.')
    assert is_lost(trained(tokenizer, NO_CALLS, row), "reply-lost", "get_weather")


def test_reasoning_is_not_written_because_the_content_holds_it(tokenizer: Any) -> None:
    row = {"messages": [u("Why?"), a("Because salt melts ice.", reasoning_content="salt melts ice")]}
    assert is_lost(trained(tokenizer, NO_PLACE, row), "reply-lost", "reasoning_content")


def test_quoted_and_trimmed_is_not_rewritten(tokenizer: Any) -> None:
    row = chat_with_call()
    row["messages"][2]["content"] = '{"sky": "grey"}\n'
    row["messages"][3]["content"] = " It rains.\n\n"
    [first, second] = trained(tokenizer, QUOTES, row)
    assert (first.count("Oslo"), second) == (1, "It rains.<|im_end|>")


def test_one_stop_token_a_reply(tokenizer: Any) -> None:
    [asks, says] = trained(tokenizer, HARMONY, chat_with_call())
    assert asks.endswith('{"city": "Oslo"}<|call|>')
    assert says == "<|channel|>final<|message|>It rains.<|return|>"
    for content in ("", "I look."):
        assert is_lost(trained(tokenizer, R1, chat_with_call(content)), "stop-token-inside")
    assert trained(tokenizer, R1, {"messages": [u("Why?"), a("So.")]}) == ["\n</think>\n\nSo.<|eos|>"]


def test_a_composed_reply_is_what_the_template_writes(tokenizer: Any) -> None:
    row = {"messages": [u("Why?"), a("So.", reasoning_content="Salt."), u("And?"), a("Wet.")]}
    assert trained(tokenizer, GLM, row) == ["Salt.</think>So.</s>", "</think>Wet.</s>"]
    spoken = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call></s>"
    assert trained(tokenizer, GLM, chat_with_call(thought="Ask."))[0] == "Ask.</think>" + spoken
    assert trained(tokenizer, GLM, chat_with_call())[0] == "</think>" + spoken


def test_a_family_that_is_not_known_is_refused(tokenizer: Any) -> None:
    opens = NO_PLACE.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif")
    assert is_lost(trained(tokenizer, opens, {"messages": [u("Why?"), a("So.")]}), "generation-prompt-differs")


def test_an_empty_block_of_thoughts_is_the_templates_own(tokenizer: Any) -> None:
    row = {"messages": [u("Why?"), a("So."), u("And?"), a("Wet.", reasoning_content="Salt.")]}
    empty, full = "<think>\n\n</think>\nSo.<|im_end|>", "<think>\nSalt.\n</think>\nWet.<|im_end|>"
    assert trained(tokenizer, SMOL, row) == [empty, full]
    assert trained(tokenizer, SMOL, row, train_reasoning=False) == ["So.<|im_end|>", "Wet.<|im_end|>"]
    block = {"messages": [u("Why?"), a("<think>\nSalt.\n</think>\n\nWet.")]}
    assert trained(tokenizer, SMOL, block) == [full]


@pytest.mark.parametrize("content", ["So.", "So. \n", "So.\n\n"])
def test_blanks_at_the_end_of_a_reply_are_said(tokenizer: Any, content: str) -> None:
    """Apertus closes a turn when the next one begins, so nothing follows a reply at the end of a chat."""
    found = trained(tokenizer, APERTUS, {"messages": [u("Why?"), a(content), u("And?"), a(content)]})
    assert found == [f"{content}<|assistant_end|>"] * 2


@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_a_greeting_that_opens_the_chat(tokenizer: Any, before: list[Row]) -> None:
    row = {"messages": [*before, a("Hello there."), u("Who?"), a("A model.")]}
    found = trained(tokenizer, FIRST, row)
    assert found in (["A model.<|im_end|>"], ["Hello there.<|im_end|>", "A model.<|im_end|>"])
    assert trained(tokenizer, NO_PLACE, row) == ["Hello there.<|im_end|>", "A model.<|im_end|>"]


@pytest.mark.parametrize("template", [MENTIONS, SHUTS])
def test_thoughts_in_the_content_are_text_where_the_template_only_mentions_them(tokenizer: Any, template: str) -> None:
    """SmolLM3, Granite and phi-4 mention <think> in their system prompt, but write no reasoning_content."""
    block = "<think>\nSalt.\n</think>\n\nWet."
    found = trained(tokenizer, template, {"messages": [u("Why?"), a(block)]})
    assert found == [f"{block}<|im_end|>"]
    field = {"messages": [u("Why?"), a("Wet.", reasoning_content="Salt.")]}
    assert "reasoning_content" in trained(tokenizer, template, field)


def test_an_empty_block_that_the_prompt_has_written_is_context(tokenizer: Any) -> None:
    assert trained(tokenizer, SHUTS, {"messages": [u("Why?"), a("So.")]}) == ["So.<|im_end|>"]


def test_thoughts_are_context_in_channels(tokenizer: Any) -> None:
    row = {"messages": [u("Why?"), a("So.", reasoning_content="Salt.")]}
    [text] = trained(tokenizer, HARMONY, row, train_reasoning=False)
    assert "Salt." not in text
    assert text.endswith("So.<|return|>")
