"""A row's outcome does not depend on other rows: any order of a file gives what each row gives alone."""

from __future__ import annotations

import copy
import datetime
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SHARED, needs_shared
from test_matrix import HABITS, SHAPES, a, all_templates, encoder_for, tokenizer_for, u
from test_proof_plans import chats
from tunesmith.chat_template.template import ChatTemplate, RenderSettings
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.neutral import STAND_IN, Watcher
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message
from tunesmith.sources.read import RawRow, find_sources, read_rows

DATE = datetime.datetime(2026, 1, 2)
ROWS = [*SHAPES.values(), *chats(0), *chats(1), {"messages": [{"role": "user", "content": "Q"}]}, {"text": "raw"}]


def outcome(row: LabelledRow) -> tuple[Any, ...]:
    """Everything that labelling a row gives, with ids and masks as bytes."""
    samples = [(sample.input_ids.tobytes(), sample.loss_mask.tobytes()) for sample in row.samples]
    return row.status, row.how, row.reason, row.notes, row.tokens_lost, samples


def label_file(own: Any, rows: list[RawRow], **more: Any) -> list[tuple[Any, ...]]:
    data = DataSection(train=["x"], max_refused=1.0, **more)
    return [outcome(row) for row in label_rows(copy.deepcopy(rows), encoder_for(own), data, 8192)]


def assert_alone(own: Any, rows: list[RawRow], checked: list[int]) -> None:
    together = label_file(own, rows)
    for index in checked:
        assert together[index] == label_file(own, [rows[index]])[0], rows[index].where


@pytest.mark.parametrize("habit", sorted(HABITS))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_rows_in_any_order_are_labelled_as_alone(tokenizer: Any, habit: str, seed: int) -> None:
    rng = random.Random(seed)
    rows = [RawRow("x", number, row) for number, row in enumerate(rng.sample(ROWS, len(ROWS)), 1)]
    # the last rows come after most others
    assert_alone(tokenizer_for(tokenizer, HABITS[habit]), rows, [*range(len(rows) - 4, len(rows)), rng.randrange(40)])


@pytest.mark.parametrize("habit", sorted(HABITS))
def test_untrained_thoughts_are_found_in_later_rows_too(tokenizer: Any, habit: str) -> None:
    own = tokenizer_for(tokenizer, HABITS[habit])
    thinks = RawRow("x", 9, {"messages": [u("Why?"), a("[THINK]So it is.[/THINK]Therefore.")]})
    rows = [*(RawRow("x", number, {"messages": [u("Q?"), a(f"A{number}.")]}) for number in range(1, 9)), thinks]
    assert label_file(own, rows, train_reasoning=False)[-1] == label_file(own, [thinks], train_reasoning=False)[0]


@needs_shared
@pytest.mark.parametrize(
    "file", ["fastchat/dummy_conversation.json", "llamafactory/glaive_toolcall_en_demo.json", "emollm/data.json"]
)
def test_rows_of_real_files_are_labelled_as_alone(tokenizer: Any, file: str) -> None:
    rows = list(read_rows(find_sources([str(SHARED / "data" / file)])))
    for number, (name, text) in enumerate(sorted(all_templates().items())):
        if number % 7:
            continue
        rng = random.Random(number)
        chosen = rng.sample(rows, 45)
        try:
            assert_alone(tokenizer_for(tokenizer, text), chosen, [43, 44, rng.randrange(40)])
        except ModelError:
            assert name not in HABITS


def test_what_a_watched_template_looks_for_does_not_depend_on_what_it_watched_before() -> None:
    text = (
        "{% for m in messages %}{% if loop.index > 4 and '/think' in m.content %}T{% endif %}"
        "{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = ChatTemplate(text, "test", {}).with_settings(RenderSettings(DATE))
    turns = [Message(role, STAND_IN.format(i)) for i, role in enumerate(("user", "assistant") * 3)]
    watcher = Watcher(renderer)
    first = watcher.find_terms(turns[:2])
    assert first is not None
    longer = watcher.find_terms(turns)
    assert longer is not None
    assert (first.sought, longer.sought) == ((), ("/think",))
    assert watcher.find_terms(turns[:2]) == first
