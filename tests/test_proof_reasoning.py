"""data.train_reasoning false: no token of the reasoning is trained and the whole answer is, or the row is refused."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

import tokenizers_of_others as others
from proof_shapes import ID, OSLO, WEATHER, call, tool
from test_matrix import HABITS, a, all_templates, encoder_for, tokenizer_for, u
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.sources.read import RawRow

Row = dict[str, Any]
THOUGHT = "Zounds, quoth she"
SHAPES: dict[str, Row] = {
    "thought": {"messages": [u("Why?"), a("Ice melts.", reasoning_content=THOUGHT)]},
    "thought of two lines": {"messages": [u("Why?"), a("Ice melts.", reasoning_content=f"{THOUGHT}\n\n{THOUGHT}")]},
    "no thought": {"messages": [u("Why?"), a("Ice melts.")]},
    "every turn": {"messages": [u("Why?"), a("Ice melts.", reasoning_content=THOUGHT), u("So?"), a("It is wet.", reasoning_content=THOUGHT)]},
    "first turn": {"messages": [u("Why?"), a("Ice melts.", reasoning_content=THOUGHT), u("So?"), a("It is wet.")]},
    "last turn": {"messages": [u("Why?"), a("Ice melts."), u("So?"), a("It is wet.", reasoning_content=THOUGHT)]},
    "block": {"messages": [u("Why?"), a(f"<think>\n{THOUGHT}\n</think>\n\nIce melts.")]},
    "two blocks": {"messages": [u("Why?"), a(f"<think>{THOUGHT}</think><think>{THOUGHT}</think>Ice melts.")]},
    "block of another family": {"messages": [u("Why?"), a(f"<seed:think>{THOUGHT}</seed:think>Ice melts.")]},
    "block in brackets": {"messages": [u("Why?"), a(f"[THINK]{THOUGHT}[/THINK]Ice melts.")]},
    "block of Cohere": {"messages": [u("Why?"), a(f"<|START_THINKING|>{THOUGHT}<|END_THINKING|>Ice melts.")]},
    "block without a beginning": {"messages": [u("Why?"), a(f"{THOUGHT}\n</think>\n\nIce melts.")]},
    "block without an end": {"messages": [u("Why?"), a(f"<think>\n{THOUGHT}")]},
    "block in the middle": {"messages": [u("Why?"), a(f"Ice <think>{THOUGHT}</think> melts.")]},
    "field and block": {"messages": [u("Why?"), a(f"<think>{THOUGHT}</think>Ice melts.", reasoning_content=THOUGHT)]},
    "thought, words and a call": {
        "messages": [u("Rain?"), a("Ice melts.", reasoning_content=THOUGHT, tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It is wet.", reasoning_content=THOUGHT)],
        "tools": [WEATHER],
    },
    "thought and a call": {
        "messages": [u("Rain?"), a("", reasoning_content=THOUGHT, tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It is wet.")],
        "tools": [WEATHER],
    },
}  # fmt: skip
_HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
_END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OWN = {  # habits of templates with and without support for reasoning
    "Seed": _HEAD + "{% if m.reasoning_content %}{{ '<seed:think>' + m.reasoning_content + '</seed:think>' }}{% endif %}{{ m.content }}" + _END,
    "Seed, always": _HEAD + "{% if m.role == 'assistant' %}{{ '<seed:think>' + (m.reasoning_content or '') + '</seed:think>' }}{% endif %}{{ m.content }}" + _END,
    "channels": "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    "no tags at all": _HEAD + "{% if m.reasoning_content %}{{ m.reasoning_content + '\n\n' }}{% endif %}{{ m.content }}" + _END,
    "nothing between": _HEAD + "{{ m.reasoning_content or '' }}{{ m.content }}" + _END,
    "thought behind the words": _HEAD + "{{ m.content + ' // ' + (m.reasoning_content or '') }}" + _END,
    "thought twice": _HEAD + "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}" + _END,
    "words, thought, words": _HEAD + "{{ m.content }}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' + m.content }}{% endif %}" + _END,
    "another end before words": _HEAD + "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + ('</think>' if m.content|length > 8 else '<END>') }}{% endif %}{{ m.content }}" + _END,
    "opens": _HEAD + "{{ m.content }}" + _END.replace("assistant\n", "assistant\n<think>\n"),
}  # fmt: skip


def label(encoder: Encoder, row: Row) -> LabelledRow:
    return next(
        label_rows([RawRow("x", 1, copy.deepcopy(row))], encoder, DataSection(train=["x"], train_reasoning=False), 4096)
    )


def find_wrong(encoder: Encoder, shape: Row, row: LabelledRow) -> str | None:
    trained = "\n".join(encoder.tokenizer.decode(s.input_ids[s.loss_mask == 1]) for s in row.samples)
    if any(word in trained for word in ("Zounds", "quoth", "ounds,")):
        return f"a thought is trained: {trained!r}"
    said = [m["content"].rpartition(">")[2].rpartition("]")[2].strip() for m in shape["messages"] if m["role"] == "assistant"]  # fmt: skip
    said += ["Oslo" for m in shape["messages"] if m.get("tool_calls")]
    missing = [text for text in said if text not in trained]
    return f"not trained: {missing} in {trained!r}" if missing else None


def assert_untrained(tokenizer: Any, templates: dict[str, str], tokens: list[str]) -> int:
    wrong, used = [], 0
    for name, template in templates.items():
        own = tokenizer_for(tokenizer, template)
        own.add_tokens(tokens, special_tokens=True)
        try:
            encoder = encoder_for(own)
        except ModelError:
            continue
        for shape_name, shape in SHAPES.items():
            row = label(encoder, shape)
            used += row.status == "used"
            found = find_wrong(encoder, shape, row) if row.status == "used" else None
            wrong += [f"{name} / {shape_name}: {found}"] if found else []
    assert not wrong, "\n".join(wrong)
    return used


@pytest.mark.parametrize(
    "tokens", [[], ["<think>", "</think>", "<seed:think>", "</seed:think>", "[THINK]", "[/THINK]"]]
)
def test_no_habit_trains_a_thought(tokenizer: Any, tokens: list[str]) -> None:
    assert assert_untrained(tokenizer, {**HABITS, **OWN}, tokens) > 100


@pytest.mark.parametrize("name", ["own", "minimind", "llama2"])
def test_no_template_trains_a_thought(tokenizer: Any, name: str) -> None:
    if name != "own" and not others.FOLDER.is_dir():
        pytest.skip("the shared tokenizers are not beside this checkout")
    if name != "own" and not os.environ.get("TUNESMITH_LONG"):
        pytest.skip("TUNESMITH_LONG=1 runs it")
    real = {key: text for key, text in all_templates().items() if key not in HABITS}
    if not os.environ.get("TUNESMITH_LONG"):
        real = dict(list(real.items())[::2])
    assert assert_untrained(tokenizer if name == "own" else others.build(name), real, []) > 3 * len(real)
