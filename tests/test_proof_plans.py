"""Samples made from plans equal those labelled without plans; templates that inspect texts get no plans."""

from __future__ import annotations

import datetime
import os
import random
from typing import Any

import numpy as np
import pytest

import tokenizers_of_others as others
from test_matrix import all_templates, encoder_for, tokenizer_for
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.patterns import Planner
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import RawRow

Row = dict[str, Any]
DATE = datetime.datetime(2026, 1, 2)
WORDS = ["the answer", "fox", "你好，世界。", "🙂", "é", "e\u0301", "\n", "\n\n", "    x = 1", "12", "a\tb", "…", "\u200f", "ש", "👩‍👩‍👧",
         "</think>", "<think>", "<tool_response>", "<|im_end|>", "[INST]", "</s>", "/no_think", "<", ">", "{{ x }}", '"q"', "\\", "\u2028", "\u00a0"]  # fmt: skip
PLAIN = WORDS[:15]


def text(rng: random.Random, words: list[str]) -> str:
    made = rng.choice(["", "", "", " ", "\n"]) if words is WORDS else ""
    made += "W" + " ".join(rng.choice(words) for _ in range(rng.randint(1, 8))) + rng.choice(["!", ".", ""])
    return made + (rng.choice(["", "", "", " ", "\n\n"]) if words is WORDS else "")


def chats(seed: int) -> list[Row]:
    """A dozen chats on which plans are compared first, then chats of every length."""
    rng = random.Random(seed)
    rows = []
    for number in [1, 2, 1, 3, 1, 2, 1, 3, 1, 1, 2, 1, *range(1, 8), 11, 15]:
        words = rng.choice([PLAIN, PLAIN, WORDS])
        turns = [{"role": "system", "content": text(rng, words)}] if rng.random() < 0.3 else []
        for _ in range(number):
            turns += [
                {"role": "user", "content": text(rng, words) if rng.random() < 0.97 else ""},
                {"role": "assistant", "content": text(rng, words)},
            ]
        rows.append({"messages": turns})
    return rows


def label(encoder: Encoder, rows: list[Row], **data: Any) -> list[LabelledRow]:
    raw = [RawRow("x", number, row) for number, row in enumerate(rows, 1)]
    return list(label_rows(raw, encoder, DataSection(train=["x"], max_refused=1.0, **data), 8192))


def label_both(
    monkeypatch: pytest.MonkeyPatch, encoder: Encoder, rows: list[Row], **data: Any
) -> tuple[list[LabelledRow], list[LabelledRow], int]:
    """Samples with plans, without, and the number of planned rows."""
    planned: list[bool] = []
    plan = Planner.plan

    def counting(self: Planner, conversation: Any) -> Any:
        made = plan(self, conversation)
        planned.append(made is not None)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(Planner, "plan", counting)
        one = label(encoder, rows, **data)
    with monkeypatch.context() as patched:
        patched.setattr(Planner, "plan", lambda *_: None)
        return one, label(encoder, rows, **data), sum(planned)


def assert_equal(name: str, ones: list[LabelledRow], twos: list[LabelledRow]) -> None:
    for one, two in zip(ones, twos, strict=True):
        assert (one.status, one.how, one.reason) == (two.status, two.how, two.reason), (name, one.number)
        assert set(one.notes) == set(two.notes), (name, one.number)
        assert len(one.samples) == len(two.samples)
        for a, b in zip(one.samples, two.samples, strict=True):
            assert np.array_equal(a.input_ids, b.input_ids), (name, one.number)
            assert np.array_equal(a.loss_mask, b.loss_mask), (name, one.number)


@pytest.mark.parametrize("name", ["own", "minimind", "gpt2", "llama2"])
def test_planned_samples_are_those_without_plans(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "own" and not others.FOLDER.is_dir():
        pytest.skip("the shared tokenizers are not beside this checkout")
    base = tokenizer if name == "own" else others.build(name)
    total = 0
    for number, (key, template) in enumerate(all_templates().items()):
        if not os.environ.get("TUNESMITH_LONG") and number % (2 if name == "own" else 9):
            continue
        try:
            encoder = encoder_for(tokenizer_for(base, template))
        except ModelError:
            continue
        ones, twos, planned = label_both(monkeypatch, encoder, chats(number))
        assert_equal(key, ones, twos)
        total += planned
    assert total > 20


# Conditions on which a prompt may depend although the finished chat does not show it. All of these were planned, and
# wrong, when plans were based on the finished chat only.
_LAST = "messages[-1].content"
DECIDES = {  # condition: (a question for which it holds, pairs before it)
    f"{_LAST}|length > 20": ("Why is the sky so very blue today?", 0),
    f"({_LAST} ~ 'x')|length > 20": ("Why is the sky so very blue today?", 0),
    f"('a' + {_LAST} + 'b')|length > 20": ("Why is the sky so very blue today?", 0),
    f"{_LAST}[0] == 'X'": ("X?", 0),
    f"{_LAST}[:2] == 'X?'": ("X?", 0),
    f"{_LAST}[-2:] == '!?'": ("X!?", 0),
    f"{_LAST}|first == 'X'": ("X?", 0),
    f"{_LAST}|upper == {_LAST}": ("WHY?", 0),
    f"{_LAST} is upper": ("WHY?", 0),
    f"{_LAST}.isupper()": ("WHY?", 0),
    f"{_LAST} == 'Why?'": ("Why?", 0),
    f"{_LAST} in 'Why? How?'": ("How?", 0),
    f"{_LAST} in ['Why?']": ("Why?", 0),
    f"{_LAST} > 'Z'": ("ever?", 0),
    f"'Why?' == {_LAST}": ("Why?", 0),
    f"'/think' in {_LAST}": ("So /think now?", 0),
    f"('</th' ~ {_LAST}).startswith('</think>')": ("ink>?", 0),
    f"'ab?c' in ('ab' ~ {_LAST} ~ 'c')": ("?", 0),
    f"{_LAST}.endswith(('!?', '??'))": ("Why!?", 0),
    f"{_LAST}.count('y') > 1": ("yes or yes?", 0),
    f"{_LAST}.split()|length > 3": ("Is it so now ?", 0),
    f"{_LAST}.split('\\n')|length > 1": ("Why\nso?", 0),
    f"{_LAST}|wordcount > 3": ("Is it so now ?", 0),
    f"{_LAST}|int(0) == 7": ("7", 0),
    f"{_LAST}|trim('XY')|length < 2": ("XYX", 0),
    f"{_LAST}.strip('?')|length == 0": ("?????", 0),
    f"{_LAST}.lower().startswith('why')": ("WHY?", 0),
    f"{_LAST}|list|length > 20": ("Why is the sky so very blue today?", 0),
    f"{_LAST}|tojson|length > 20": ("Why is the sky so very blue today?", 0),
    "(messages|map(attribute='content')|join(' '))|length > 60": ("Why is the sky so blue today, and so very blue, and then so very grey as well, at times?", 0),
    "messages|map(attribute='content')|unique|list|length < messages|length": ("Q0?", 1),
    "(messages|sort(attribute='content'))[0].role == 'user' and messages|length > 1": ("A", 1),
    "messages[-1].content == messages[0].content and messages|length > 1": ("Q0?", 1),
    "messages[-1] == messages[0] and messages|length > 1": ("Q0?", 1),
    "messages|string|length > 1000": ("Why? " * 200 + "!", 0),
    f"{{{_LAST}: 1}}['Why?'] is defined": ("Why?", 0),
    f"'%s' % {_LAST} == 'Why?'": ("Why?", 0),
    f"'{{}}'.format({_LAST}) == 'Why?'": ("Why?", 0),
    f"({_LAST} * 3)|length > 60": ("Why is the sky so very blue today?", 0),
    f"size({_LAST}) == 'long'": ("Why is the sky so very blue today?", 0),
    f"echo({_LAST})|length > 20": ("Why is the sky so very blue today?", 0),
    f"echo({_LAST})|trim == 'Why?'": ("Why?", 0),
    "ns.said|length > 60": ("Why is the sky so very blue today? " * 3 + "!", 0),
    "ns.longest > 20": ("Why is the sky so very blue today?", 0),
    "messages|length > 15": ("Why?", 9),
    "messages|length == 21": ("Why?", 10),
    "ns.count >= 8": ("Why?", 9),
    "messages|length % 14 == 13": ("Why?", 13),
    "messages|length > limit": ("Why?", 12),
    "messages[12] is defined": ("Why?", 9),
    "messages[10:]|length > 2": ("Why?", 9),
}  # fmt: skip
_STATE = (
    "{% macro size(text) %}{{ 'long' if text|length > 20 else 'short' }}{% endmacro %}{% macro echo(text) %}{{ text }}{% endmacro %}"
    "{% set ns = namespace(said='', longest=0, count=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.count = ns.count + 1 %}"
    "{% set ns.said = ns.said + m.content %}{% if m.content|length > ns.longest %}{% set ns.longest = m.content|length %}{% endif %}{% endif %}{% endfor %}"
)  # fmt: skip
_CHAT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def short(pairs: int, last: str = "Query?") -> Row:
    turns = [{"role": r, "content": c} for i in range(pairs) for r, c in (("user", f"Q{i}?"), ("assistant", f"A{i}."))]
    return {"messages": [*turns, {"role": "user", "content": last}, {"role": "assistant", "content": "A."}]}


@pytest.mark.parametrize("condition", DECIDES)
def test_a_prompt_that_depends_on_what_is_said_is_never_planned_wrongly(
    tokenizer: Any, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, before = DECIDES[condition]
    state = _STATE if any(name in condition for name in ("ns.", "size(", "echo(")) else ""
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if CONDITION %}{{ '<think>\n' }}{% endif %}{% endif %}"
    own = tokenizer_for(tokenizer, state + _CHAT + ask.replace("CONDITION", condition))
    encoder = build_encoder(own, None, {"limit": 20} if "limit" in condition else {}, DATE)
    rows = [*(short(number % 4) for number in range(12)), short(before, question), short(before), short(6), short(14)]
    ones, twos, _ = label_both(monkeypatch, encoder, rows)
    assert_equal(condition, ones, twos)
    assert twos[0].how == "as_rendered"
    assert twos[12].how != "as_rendered"  # it depends on it: composed, or refused


REWRITES = {  # rewrites of the last reply only, so that each reply needs a sample
    "m.content.strip('aW')": "aW so aW",
    "m.content|upper": "so",
    "m.content[:6]": "so it goes on",
    "m.content|truncate(9, True, '')": "so it goes on",
    "m.content.split()|join(' ')": "so   it\n goes",
    "m.content|replace('so', 'thus')": "so it goes",
    "m.content|tojson": 'so "it" goes',
    "m.content.title()": "so it goes",
    "(m.content|list|sort|join) if m.content|length > 6 else m.content": "so it goes",
    "m.content|escape": "so < it",
    "m.content if loop.index < 12 else ''": "so it",
    "m.content + ('!' if loop.index > 9 else '')": "so it",
    "m.content ~ loop.length": "so it",
}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_last_reply_that_is_rewritten_is_never_planned_wrongly(
    tokenizer: Any, rewrite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = REWRITES[rewrite]
    turn = "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' + (REWRITE) }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    rewrite = f"m.content if 'tunesmith' in m.content else ({rewrite})"  # the stand-ins that find the stop token are not rewritten
    template = "{% for m in messages %}" + turn.replace("REWRITE", rewrite) + "{% endfor %}" + ask
    encoder = encoder_for(tokenizer_for(tokenizer, template))
    said = [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "A."},
    ]
    rows = [*(short(number % 4) for number in range(12)), short(8), short(1)]
    rows += [{"messages": [{"role": "user", "content": "Q?"}, *said]} for _ in range(2)]
    ones, twos, _ = label_both(monkeypatch, encoder, rows)
    assert_equal(rewrite, ones, twos)


def test_a_tokenizer_that_joins_over_a_border_is_labelled_as_without_plans(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    encoder = encoder_for(tokenizer_for(tokenizer, template))
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in [("Q?", "A."), ("The answ", "er is so")] * 12]  # fmt: skip
    ones, twos, _ = label_both(monkeypatch, encoder, rows)
    assert_equal("border", ones, twos)
