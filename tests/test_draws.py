"""System prompts added to a share of rows, and empty think blocks kept in a share: the draws and the labels.

The oracles: the row with the system prompt written into it, and a template that writes no empty block.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import chat_row, raises
from proof_shapes import ID, OSLO, WEATHER, call, tool
from test_matrix import HABITS, SYSTEM, a, tokenizer_for, u
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.patterns import Planner
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import Conversation, Message
from tunesmith.sources.read import RawRow

Row = dict[str, Any]
IS_LONG = bool(os.environ.get("TUNESMITH_LONG"))
EXAMPLES = 10_000 if IS_LONG else 60
PROMPTS = ["Answer briefly.", "You are kind.", "你是一个助手。"]
_HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
_SAID = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
_TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
_THOUGHT = "{% if m.role == 'assistant' %}{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% else %}EMPTY{% endif %}{% endif %}"
_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + ' as in <think>\n\n</think>\n\n<|im_end|>\n' }}{% endif %}"
BLOCK = "{{ '<think>\n\n</think>\n\n' }}"
# EMPTY is where the empty block is written, in another place by each family
TEMPLATES = {
    "before every reply, in the prompt too": _TOOLS + _HEAD + _THOUGHT + _SAID + _TAIL + "EMPTY{% endif %}",
    "before every reply, not in the prompt": _TOOLS + _HEAD + _THOUGHT + _SAID + _TAIL + "{% endif %}",
    "before the last reply": _TOOLS + _HEAD + _THOUGHT.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last") + _SAID + _TAIL + "{% endif %}",
    "before the last reply, in the prompt if asked": _TOOLS + _HEAD + _THOUGHT.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last") + _SAID + _TAIL
    + "{% if enable_thinking is defined and not enable_thinking %}EMPTY{% endif %}{% endif %}",
    "without a place for reasoning": _HEAD + "{% if m.role == 'assistant' %}EMPTY{% endif %}" + _SAID + _TAIL + "{% endif %}",
    "of another family": (_HEAD + "{% if m.role == 'assistant' %}EMPTY{% endif %}" + _SAID + _TAIL + "{% endif %}").replace("EMPTY", "SEED"),
    "in a generation mark": "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}EMPTY{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}  # fmt: skip
CALLED = [u("Rain?"), a("", tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It rains.")]
SHAPES: dict[str, Row] = {
    "one turn": chat_row("Why?", "Ice melts."),
    "many turns": {"messages": [message for i in range(9) for message in (u(f"Why {i}?"), a(f"Ice {i} melts."))]},
    "system": {"messages": [SYSTEM, u("Why?"), a("Ice melts."), u("So?"), a("It is wet.")]},
    "call": {"messages": CALLED, "tools": [WEATHER]},
    "words and a call": {"messages": [u("Rain?"), a("I look.", tool_calls=[call("get_weather", OSLO, ID)]), tool("wet", ID), a("It rains.")], "tools": [WEATHER]},
    "blanks": {"messages": [u("  Why? \n"), a("\n\n Ice melts. \n"), u("So?"), a(" It is wet.")]},
    "the block in a question": chat_row("What is <think>\n\n</think>\n\n for?", "For nothing."),
    "the block in a reply": chat_row("What is it?", "It is <think>\n\n</think>\n\n, an empty block."),
    "tags in a reply": {"messages": [u("What?"), a("The tag </think> ends it."), u("And?"), a("And <think> begins it.")]},
    "an untrained turn": {"messages": [u("Why?"), a("Ice melts.", loss_weight=0), u("So?"), a("It is wet.", loss_weight=1)]},
    "empty reasoning": {"messages": [u("Why?"), a("Ice melts.", reasoning_content=""), u("So?"), a("It is wet.", reasoning_content=None)]},
    "a prefill": {"prompt": [u("Why?"), a("Ice")], "completion": [a(" melts.")]},
    "a question and its answer": {"prompt": "Why?", "completion": "Ice melts."},
    "earlier turns": {"instruction": "Why?", "output": "Ice melts.", "history": [["Who?", "I."], ["Where?", "Here."]]},
    "a greeting": {"messages": [a("Hello."), u("Why?"), a("Ice melts.")]},
    "two replies": {"messages": [u("Why?"), a("Ice melts."), a("It is wet.")]},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "train_reasoning": {"train_reasoning": False},
    "unroll": {"history": "unroll"},
    "last_turn": {"history": "last_turn"},
    "last_assistant": {"train_on": "last_assistant"},
    "all": {"train_on": "all"},
    "allow": {"control_text": "allow"},
}


def write_block(template: str, is_bare: bool = False) -> str:
    seed = "{{ '<seed:think></seed:think>' }}"
    return template.replace("EMPTY", "" if is_bare else BLOCK).replace("SEED", "" if is_bare else seed)


@pytest.fixture(scope="module")
def base() -> Any:
    return train_tokenizer(["Hello there, what is this? It is 12 cats. Why? Ice melts. 你好"], vocab_size=380)


def open_encoder(base: Any, template: str, has_tags: bool, control_text: str = "plain") -> Encoder:
    """An encoder with the tags of reasoning as added tokens, as in Qwen3's tokenizer, or as ordinary text."""
    import datetime

    tokenizer = tokenizer_for(base, template)
    if has_tags:
        from tokenizers import AddedToken

        tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
        tokenizer.add_tokens(tags)
    return build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2), control_text=control_text)


def label(encoder: Encoder, row: Row, draws: RowDraws | None = None, number: int = 1, **data: Any) -> LabelledRow:
    section = DataSection(train=["x"], **data)
    return next(label_rows([RawRow("x", number, row)], encoder, section, 8192, draws=draws))


def label_all(encoder: Encoder, rows: Iterable[Row], draws: RowDraws | None = None, **data: Any) -> list[LabelledRow]:
    raw = [RawRow("x", number, row) for number, row in enumerate(rows, 1)]
    return list(label_rows(raw, encoder, DataSection(train=["x"], **data), 8192, draws=draws))


@pytest.fixture(scope="module")
def pairs(base: Any) -> dict[tuple[str, bool, str], tuple[Encoder, Encoder]]:
    """Each template with and without its block."""
    return {
        (name, has_tags, control): tuple(
            open_encoder(base, write_block(template, is_bare), has_tags, control) for is_bare in (False, True)
        )
        for (name, template), has_tags, control in itertools.product(TEMPLATES.items(), (True, False), ("plain", "allow"))
    }  # fmt: skip


def draws_of(seed: int = 0, **data: Any) -> RowDraws:
    draws = RowDraws.of(DataSection(train=["x"], **data), seed)
    assert draws is not None
    return draws


BARE = draws_of(empty_think_share=0.0)


def samples_of(row: LabelledRow) -> list[tuple[list[int], list[int]]]:
    return [(sample.input_ids.tolist(), sample.loss_mask.tolist()) for sample in row.samples]


def replies_of(row: LabelledRow) -> list[tuple[list[int], int]]:
    """Of each reply the ids up to its end, and where it begins."""
    found = []
    for ids, mask in samples_of(row):
        edges = [index for index in range(1, len(mask)) if mask[index] != mask[index - 1]] + [len(mask)]
        found += [(ids[:end], start) for start, end in itertools.pairwise(edges) if mask[start]]
    return found


def chat(text: str, *more: Message) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", "Yes."), *more))


# the draws


def test_a_share_is_a_share_of_the_rows() -> None:
    draws = draws_of(7, system_prompts=PROMPTS, system_prompt_share=0.2, empty_think_share=0.3)
    found = [draws.draw(number, chat("Why?")) for number in range(1, 20_001)]
    added = Counter(draw.system_prompt for draw in found)
    kept = sum(draw.keeps_empty_think for draw in found)
    both = sum(draw.keeps_empty_think for draw in found if draw.system_prompt)
    for count, expected in ((20_000 - added[None], 4_000), (kept, 6_000), (both, 1_200)):
        assert abs(count - expected) < 5 * expected**0.5
    for prompt in PROMPTS:
        assert abs(added[prompt] - 4_000 / 3) < 5 * (4_000 / 3) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_row_and_every_row(share: float) -> None:
    draws = RowDraws(tuple(PROMPTS), share, share, 0)
    found = [draws.draw(number, chat("Why?")) for number in range(1000)]
    assert {draw.system_prompt is not None for draw in found} == {share == 1}
    assert {draw.keeps_empty_think for draw in found} == {share == 1}


def test_a_draw_depends_on_the_seed_the_number_and_the_text() -> None:
    def drawn(draws: RowDraws, shift: int = 0, text: str = "Why?") -> list[bool]:
        return [draws.draw(number + shift, chat(text)).keeps_empty_think for number in range(200)]

    half = draws_of(1, empty_think_share=0.5)
    others = drawn(draws_of(2, empty_think_share=0.5)), drawn(half, shift=1000), drawn(half, text="Who?")
    assert drawn(half) == drawn(draws_of(1, empty_think_share=0.5))
    for other in others:
        assert 50 < sum(one == two for one, two in zip(drawn(half), other, strict=True)) < 150


def test_a_larger_share_keeps_the_rows_of_a_smaller_one() -> None:
    small, large = (draws_of(system_prompts=PROMPTS, system_prompt_share=share) for share in (0.2, 0.6))
    for number in range(500):
        drawn = small.draw(number, chat("Why?")).system_prompt
        assert drawn is None or large.draw(number, chat("Why?")).system_prompt == drawn


def test_nothing_is_drawn_by_default() -> None:
    assert RowDraws.of(DataSection(train=["x"]), 3) is None
    assert RowDraws.of(DataSection(train=["x"], system_prompts=PROMPTS, system_prompt_share=0.0), 3) is None


def test_draws_do_not_depend_on_other_rows(base: Any) -> None:
    encoder = open_encoder(base, write_block(TEMPLATES["before every reply, in the prompt too"]), True)
    data = DataSection(train=["x"], system_prompts=PROMPTS, system_prompt_share=0.5, empty_think_share=0.5)
    draws = RowDraws.of(data, 5)
    rows = [RawRow(f"{i % 3}.jsonl", i, chat_row(f"Why {i}?", "Ice melts.")) for i in range(1, 61)]
    turned = [RawRow("moved/" + row.file, row.number, row.value) for row in reversed(rows)]
    limited = data.model_copy(update={"limit": 20})
    whole = [samples_of(row) for row in label_rows(rows, encoder, data, 512, draws=draws)]
    assert whole == [samples_of(row) for row in label_rows(turned, encoder, data, 512, draws=draws)][::-1]
    assert whole[:20] == [samples_of(row) for row in label_rows(rows, encoder, limited, 512, draws=draws)]
    assert len({len(samples[0][0]) for samples in whole}) > 2


# system prompts


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_an_added_prompt_gives_the_labels_of_a_row_that_has_it(base: Any, name: str) -> None:
    draws = draws_of(system_prompts=PROMPTS[:1])
    for habit in ("plain", "thinks at the end", "system beside the last user"):
        encoder = open_encoder(base, HABITS[habit], True)
        row = label(encoder, SHAPES[name], draws)
        if name in ("system", "call", "words and a call"):
            assert (row.system_prompt, samples_of(row)) == (None, samples_of(label(encoder, SHAPES[name])))
            continue
        wanted = copy.deepcopy(SHAPES[name])
        if "messages" in wanted:
            wanted["messages"].insert(0, {"role": "system", "content": PROMPTS[0]})
        elif isinstance(wanted.get("prompt"), list):
            wanted["prompt"].insert(0, {"role": "system", "content": PROMPTS[0]})
        else:
            wanted["system"] = PROMPTS[0]
        written = label(encoder, wanted)
        assert (row.status, row.how, row.reason) == (written.status, written.how, written.reason)
        assert samples_of(row) == samples_of(written)
        assert row.system_prompt == (PROMPTS[0] if row.status == "used" else None)


@pytest.mark.parametrize("messages", [[SYSTEM, u("a"), a("b")], [u("a"), a("b"), SYSTEM, u("c"), a("d")], CALLED])
def test_a_chat_with_a_system_turn_or_calls_gets_no_prompt(messages: list[Row]) -> None:
    turns = tuple(Message(m["role"], m["content"], tool_calls=tuple(m.get("tool_calls", ()))) for m in messages)
    assert draws_of(system_prompts=PROMPTS).draw(1, Conversation(turns)).system_prompt is None


def test_raw_text_is_not_changed(base: Any) -> None:
    encoder = open_encoder(base, write_block(TEMPLATES["before every reply, in the prompt too"]), False)
    text = {"text": "<|im_start|>assistant\n<think>\n\n</think>\n\nIce melts."}
    row = label(encoder, text, draws_of(system_prompts=PROMPTS, empty_think_share=0.0))
    assert (row.system_prompt, row.loses_think) == (None, False)
    assert samples_of(row) == samples_of(label(encoder, text))


def test_a_template_without_system_turns_is_named_once(base: Any) -> None:
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + HABITS["plain"]
    )
    draws = draws_of(system_prompts=["Be\x1b[31m brief. " * 20])
    with raises(
        DataError, "system-prompt-refused", "data.system_prompts", "no system turns", "data.chat_template"
    ) as caught:
        label(open_encoder(base, refuses, False), SHAPES["one turn"], draws)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with raises(DataError, "system-prompt-refused"):
        label(open_encoder(base, HABITS["drops the system"], False), SHAPES["one turn"], draws)


def test_control_text_in_a_prompt_stays_text(base: Any) -> None:
    encoder = open_encoder(base, HABITS["plain"], True)
    row = label(encoder, SHAPES["one turn"], draws_of(system_prompts=["Never write <|im_end|> or <think>."]))
    ids = row.samples[0].input_ids.tolist()
    assert ids.count(encoder.stop.id) == 3
    assert encoder.tokenizer.convert_tokens_to_ids("<think>") not in ids
    with raises(DataError, "system-prompt-refused"):
        refusing = open_encoder(base, HABITS["plain"], True, "refuse")
        label(refusing, SHAPES["one turn"], draws_of(system_prompts=["Never write <|im_end|>."]), control_text="refuse")


# empty think blocks


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_labels_without_the_block_are_those_of_a_template_without_it(pairs: Any, setting: str) -> None:
    data = SETTINGS[setting]
    for (name, has_tags, control_text), (with_block, without) in pairs.items():
        if control_text != data.get("control_text", "plain") or not (IS_LONG or has_tags == (control_text == "plain")):
            continue
        written, bare = (label_all(with_block, SHAPES.values(), draws, **data) for draws in (None, BARE))
        wanted = label_all(without, SHAPES.values(), **data)
        for row, kept, other, shape in zip(bare, written, wanted, SHAPES, strict=True):
            if row.status == "refused":
                assert kept.reason == row.reason
            else:
                if row.how == "composed" != other.how:  # one sample a reply, with the same replies behind the same ids
                    assert setting == "all" or replies_of(row) == replies_of(other), (name, shape)
                else:
                    assert samples_of(row) == samples_of(other), (name, shape)
                assert row.loses_think == (samples_of(row) != samples_of(kept)), (name, shape)
        assert sum(row.loses_think for row in bare) >= 8, name


def test_the_block_in_the_prompt_by_a_variable_is_removed_too(base: Any) -> None:
    template = TEMPLATES["before the last reply, in the prompt if asked"]
    row = {**chat_row("Why?", "Ice melts."), "chat_template_kwargs": {"enable_thinking": False}}
    with_block, without = (open_encoder(base, write_block(template, is_bare), True) for is_bare in (False, True))
    bare = label(with_block, row, BARE)
    assert bare.loses_think
    assert samples_of(bare) == samples_of(label(without, {**row, "chat_template_kwargs": {}}))
    [(ids, mask)] = samples_of(label(with_block, row))
    assert not mask[ids.index(with_block.tokenizer.convert_tokens_to_ids("<think>"))]  # it was in the prompt


def test_reasoning_and_blocks_of_the_row_stay(base: Any) -> None:
    encoder = open_encoder(base, write_block(TEMPLATES["before every reply, not in the prompt"]), True)
    for row in (
        chat_row("Why?", "<think>\n\n</think>\n\nIce melts."),
        chat_row("Why?", "\n<think></think>Ice melts."),
        chat_row("Why?", "<think>\nSalt.\n</think>\n\nIce melts."),
        {"messages": [u("Why?"), a("Ice melts.", reasoning_content="Salt.")]},
    ):
        bare = label(encoder, row, BARE)
        assert (bare.status, bare.loses_think) == ("used", False)
        assert samples_of(bare) == samples_of(label(encoder, row))
    mixed = {"messages": [u("Why?"), a("Ice melts.", reasoning_content="Salt."), u("So?"), a("It is wet.")]}
    bare = label(encoder, mixed, BARE)
    text = encoder.tokenizer.decode(bare.samples[0].input_ids)
    assert bare.loses_think
    assert (text.count("<think>"), text.count("<think>\nSalt.\n</think>")) == (1, 1)


def test_a_template_without_the_block_is_left_alone(base: Any) -> None:
    for habit in HABITS:
        if habit == "thinks at the end":
            continue
        encoder = open_encoder(base, HABITS[habit], True)
        written, bare = (label_all(encoder, SHAPES.values(), draws) for draws in (None, BARE))
        assert not any(row.loses_think for row in bare)
        assert [samples_of(row) for row in bare] == [samples_of(row) for row in written]


def test_long_chats_without_the_block_have_plans(base: Any) -> None:
    """Labelled from plans (data/patterns.py), so that a share of rows without blocks is as fast as one with them."""
    from tunesmith.chat_template.habits import find_empty_think

    turns = [Message(role, f"Text {i}.") for i in range(20) for role in ("user", "assistant")]
    for name in ("before every reply, in the prompt too", "before the last reply"):
        encoder = open_encoder(base, write_block(TEMPLATES[name]), True)
        renderer = encoder.renderer()
        assert renderer is not None
        planner = Planner(encoder, renderer, True, find_empty_think(renderer))
        for messages in (turns, [Message("system", "Be brief."), *turns]):
            planned = planner.plan(Conversation(tuple(messages)))
            assert planned is not None
            assert planner.has_block(Conversation(tuple(messages)))


PIECES = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</think>",
    "<think>",
    "<think>\n\n</think>\n\n",
    "\n",
    "\n\n",
    " ",
    "a",
    "b c",
    "猫",
    "🙂",
    "<",
    "|",
]
texts = st.lists(st.sampled_from(PIECES), min_size=0, max_size=8).map("".join)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chat_loses_the_block_and_nothing_else(pairs: Any, data: Any) -> None:
    key = data.draw(st.sampled_from(sorted(pairs)))
    with_block, without = pairs[key]
    messages = [{"role": "system", "content": data.draw(texts)}] if data.draw(st.booleans()) else []
    for number in range(data.draw(st.integers(1, 4))):
        # a reply that begins with a block of its own keeps it, which no template without blocks would write
        messages += [
            u(f"Ask{number}" + data.draw(texts)),
            a(data.draw(st.sampled_from(["", " ", "\n\n"])) + f"Say{number}" + data.draw(texts)),
        ]
    section = {**data.draw(st.sampled_from([*SETTINGS.values()])), "control_text": key[2]}
    row = {"messages": messages}
    bare, wanted = label(with_block, row, BARE, **section), label(without, row, **section)
    if bare.status == "refused":
        assert label(with_block, row, **section).status == "refused"
    else:
        assert samples_of(bare) == samples_of(wanted)


def test_the_ledger_counts_both(base: Any) -> None:
    encoder = open_encoder(base, write_block(TEMPLATES["before every reply, in the prompt too"]), True)
    data = DataSection(train=["x"], system_prompts=PROMPTS, system_prompt_share=0.5, empty_think_share=0.25)
    rows = [RawRow("x", i, chat_row(f"Why {i}?", "Ice melts." if i % 10 else "")) for i in range(1, 201)]
    ledger = Ledger()
    labelled = list(label_rows(rows, encoder, data, 512, draws=RowDraws.of(data, 0)))
    for row in labelled:
        ledger.add(row)
    added, removed = sum(bool(row.system_prompt) for row in labelled), sum(row.loses_think for row in labelled)
    assert (ledger.system_prompts_added, ledger.empty_think_removed) == (added, removed)
    assert 60 < added < 120 < removed < 160
    again = Ledger.from_json(ledger.to_json())
    assert again.to_json() == ledger.to_json()
    older = ledger.to_json()
    for entry in older["files"].values():
        del entry["system_prompts_added"], entry["empty_think_removed"]
    assert Ledger.from_json(older).system_prompts_added == 0
    assert [line.split(" (")[0] for line in ledger.describe_draws(data)] == [
        f"system prompt added to {added} rows", f"empty think block removed from {removed} rows"
    ]  # fmt: skip
