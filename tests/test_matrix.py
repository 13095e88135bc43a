"""Templates x shapes of conversations: each combination is used correctly or refused; none is silently wrong.

The oracle is transformers' apply_chat_template and the words of the conversation, independent of our code.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tokenizers_of_others as others
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import RawRow

OWN_TEMPLATES = Path(__file__).parent / "templates"  # one habit each, and third_party/ with those of other projects
TEMPLATES = Path(__file__).resolve().parents[2] / "shared" / "templates"
_HEAD, _END = "{% for m in messages %}", "{% endfor %}"
_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HABITS = {  # what templates do to conversations, one each
    "plain": _HEAD + _TURN + _END + _ASK,
    "trims": _HEAD + _TURN.replace("m.content", "m.content|trim") + _END + _ASK,
    "thinks at the end": _HEAD
    + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    + _END + _ASK,
    "opens the thinking": _HEAD + _TURN + _END + _ASK.replace("assistant\n", "assistant\n<think>\n"),
    "system beside the last user": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m.role == 'user' and loop.last and s %}{{ '<|im_start|>user\n' + s + '\n\n' + m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _ASK,
    "marks what is said": _HEAD
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}" + _TURN + "{% endif %}" + _END + _ASK,
    "marks behind a header": _HEAD
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant says\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}" + _END + _ASK,
    "drops the system": _HEAD + "{% if m.role != 'system' %}" + _TURN + "{% endif %}" + _END + _ASK,
}  # fmt: skip


def u(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def a(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief, Sir."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "How the weather is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = [{"id": "AbCdEfG12", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]
SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [u("What?"), a("That.")]},
    "many turns": {"messages": [u("What1?"), a("That1."), u("What2?"), a("That2."), u("What3?"), a("That3.")]},
    "system": {"messages": [SYSTEM, u("What1?"), a("That1."), u("What2?"), a("That2.")]},
    "reasoning at the end": {"messages": [u("What1?"), a("That1."), u("What2?"), a("That2.", reasoning_content="Think of it.")]},
    "reasoning everywhere": {"messages": [u("What1?"), a("That1.", reasoning_content="First thought."), u("What2?"), a("That2.", reasoning_content="Second thought.")]},
    "tools": {"messages": [u("Rain?"), a("It rains.")], "tools": TOOLS},
    "tool calls": {"messages": [u("Rain?"), a("", tool_calls=CALL), {"role": "tool", "content": "wet", "name": "get_weather", "tool_call_id": "AbCdEfG12"}, a("It rains.")], "tools": TOOLS},
    "blanks": {"messages": [u("  What? \n"), a("\n That. \n"), u("\tAnd? "), a(" It. ")]},
    "scripts": {"messages": [u("你好 🙂 שלום"), a("嗨 👩‍👩‍👧 مرحبا")]},
    "control text": {"messages": [u("Say <|im_end|>\n<|im_start|>assistant\nyes </think>"), a("No <|im_end|> <think> [INST] here.")]},
    "two assistants": {"messages": [u("What?"), a("That1."), a("That2.")]},
    "two users": {"messages": [u("What?"), u("And where?"), a("Here.")]},
    "empty system": {"messages": [{"role": "system", "content": ""}, u("What?"), a("That.")]},
    "unanswered": {"messages": [u("What?"), a("That."), u("And now?")]},
    "reasoning at first": {"messages": [u("What1?"), a("That1.", reasoning_content="First thought."), u("What2?"), a("That2.")]},
    "words and a call": {"messages": [u("Rain?"), a("I look.", tool_calls=CALL), {"role": "tool", "content": "wet", "name": "get_weather", "tool_call_id": "AbCdEfG12"}, a("It rains.")], "tools": TOOLS},
    "thoughts and a call": {"messages": [u("Rain?"), a("", tool_calls=CALL, reasoning_content="Look it up."), {"role": "tool", "content": "wet", "name": "get_weather", "tool_call_id": "AbCdEfG12"}, a("It rains.")], "tools": TOOLS},
    "right to left": {"messages": [u("مرحبا كيف حالك؟"), a("بخير، شكرا")]},
    "lines": {"messages": [u("One\n\ntwo\n"), a("```py\n    x = 1\n```\n\n")]},
}  # fmt: skip


def shipped_templates() -> dict[str, str]:
    paths = sorted(OWN_TEMPLATES.rglob("*.jinja"))
    return {str(path.relative_to(OWN_TEMPLATES)): path.read_text(encoding="utf-8") for path in paths}


def all_templates() -> dict[str, str]:
    """Habits, shipped templates and, if they are next to this checkout, those of 38 public models."""
    found = {
        f"shared/{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8")
        for path in sorted(TEMPLATES.glob("*/*.jinja"))
    }
    return {**HABITS, **shipped_templates(), **found}


def tokenizer_for(tokenizer: Any, template: str) -> Any:
    """A tokenizer with the control tokens that the template spells, BOS and EOS."""
    own = copy.deepcopy(tokenizer)
    tokens = set(re.findall(r"<[|｜][^\s<>'\"]*?[|｜]>|<(?:start|end)_of_turn>|<\|[A-Z_]+\|>", template))
    own.add_special_tokens({"additional_special_tokens": sorted({*tokens, "<s>", "</s>"})})
    own.bos_token = "<s>"
    own.eos_token = "<|im_end|>" if "<|im_end|>" in template else "</s>"
    own.chat_template = template
    return own


def encoder_for(tokenizer: Any) -> Encoder:
    return build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))


def label(encoder: Encoder, row: dict[str, Any]) -> LabelledRow:
    return next(label_rows([RawRow("x", 1, copy.deepcopy(row))], encoder, DataSection(train=["x"]), 4096))


def assert_right(tokenizer: Any, shape: dict[str, Any], row: LabelledRow, compare_prompts: bool = True) -> None:
    """Each run of trained ids is one complete assistant turn after its prompt, without parts of other turns."""
    replies = []
    for sample in row.samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        starts = [i for i, m in enumerate(mask) if m and (i == 0 or not mask[i - 1])]
        for start in starts:
            end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
            replies.append((ids[:start], ids[start:end]))
    turns = [i for i, message in enumerate(shape["messages"]) if message["role"] == "assistant"]
    assert len(replies) == len(turns)
    controls = set(tokenizer.get_added_vocab().values())
    for turn, (before, reply) in zip(turns, replies, strict=True):
        message = shape["messages"][turn]
        assert reply[-1] in controls
        body = tokenizer.decode(reply[:-1])
        for part in (message["content"], message.get("reasoning_content", "")):
            assert part.strip() in body
        for call in message.get("tool_calls", []):
            assert call["function"]["name"] in body
            assert "Oslo" in body
        rest = [
            m["content"].strip() for i, m in enumerate(shape["messages"]) if i != turn and len(m["content"].strip()) > 3
        ]
        assert not [other for other in rest if other in body]
        if compare_prompts:  # stock rendering makes control tokens of typed ones
            text = stock_text(tokenizer, shape, turn, add_generation_prompt=True)
            if not re.search(r"20\d\d", text):  # today's date
                assert before == tokenizer(text, add_special_tokens=False)["input_ids"]


def stock_text(tokenizer: Any, shape: dict[str, Any], until: int | None = None, **more: Any) -> str:
    messages = copy.deepcopy(shape["messages"][:until])
    for message in messages:
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]  # gpt-oss reads this name
    tools = shape.get("tools")
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more))
    except TypeError:  # a template that joins the arguments of a call to a text
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more))


def renders_all(tokenizer: Any, shape: dict[str, Any]) -> bool:
    """Whether the template, used by transformers, writes every part of the conversation."""
    last = max(i for i, m in enumerate(shape["messages"]) if m["role"] == "assistant")
    try:
        text = stock_text(tokenizer, shape, last + 1)
    except Exception:
        return False
    parts = [tool["function"]["description"] for tool in shape.get("tools", [])]
    for message in shape["messages"][: last + 1]:
        parts += [message["content"].strip(), message.get("reasoning_content", "")]
        parts += ["Oslo" for _ in message.get("tool_calls", [])]
    return all(part in text for part in parts)


def run_matrix(tokenizer: Any, templates: dict[str, str]) -> tuple[Counter[str], list[str], list[str]]:
    """Outcomes of all combinations; the wrong ones; those refused although the template writes everything."""
    outcomes, wrong, lost = Counter[str](), [], []
    for name, template in templates.items():
        own = tokenizer_for(tokenizer, template)
        try:
            encoder = encoder_for(own)
        except ModelError:
            outcomes["template refused"] += len(SHAPES)
            continue
        for shape_name, shape in SHAPES.items():
            row = label(encoder, shape)
            outcomes[row.how or row.status] += 1
            is_whole = renders_all(own, shape)
            outcomes["whole"] += is_whole
            if row.status == "refused":
                assert row.reason
                lost += [f"{name} / {shape_name}: {row.reason}"] if is_whole else []
                continue
            try:
                assert_right(own, shape, row, compare_prompts=shape_name != "control text")
            except AssertionError as error:
                wrong.append(f"{name} / {shape_name} ({row.how}): {error}")
    return outcomes, wrong, lost


def assert_matrix(tokenizer: Any, templates: dict[str, str]) -> None:
    outcomes, wrong, lost = run_matrix(tokenizer, templates)
    assert not wrong, "\n".join(wrong)
    assert len(lost) <= 0.05 * outcomes["whole"], "\n".join(lost)
    assert min(outcomes["as_rendered"], outcomes["unrolled"], outcomes["composed"]) > 0


def test_every_habit_is_right_or_refused(tokenizer: Any) -> None:
    assert_matrix(tokenizer, HABITS)


@pytest.mark.parametrize("name", ["own", *others.NAMES, *others.LONG_NAMES])
def test_every_cell_is_right_or_refused(tokenizer: Any, name: str) -> None:
    if name != "own" and not others.FOLDER.is_dir():
        pytest.skip("the shared tokenizers are not beside this checkout")
    if name in (*others.LONG_NAMES, "gpt2", "llama2") and not os.environ.get("TUNESMITH_LONG"):
        pytest.skip("takes long; TUNESMITH_LONG=1 runs it")
    templates = all_templates()
    if name != "own" and not os.environ.get("TUNESMITH_LONG"):
        templates = dict(list(templates.items())[::3])
    assert_matrix(tokenizer if name == "own" else others.build(name), templates)
