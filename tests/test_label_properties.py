"""Promise 1 on generated conversations: every trained id is accounted for, whatever the texts.

A few hundred cases here; TUNESMITH_LONG=1 runs ten thousand.
"""

from __future__ import annotations

import copy
import datetime
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_matrix import HABITS, assert_right, tokenizer_for
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import RawRow

EXAMPLES = 10_000 if os.environ.get("TUNESMITH_LONG") else 300
PIECES = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "</think>", "<think>", "<", "|", "im_end", "|>", "\n", "\n\n",
          " ", "  ", "a", "b c", "The", "猫", "你好", "🙂", "👩‍👩‍👧", "é", "e\u0301", "ש", "\u200f", "\u00a0", "\t", "0", "12", ".", "<s>"]  # fmt: skip
# each turn has a distinct text, so that the oracle can tell turns apart
texts = st.lists(st.sampled_from(PIECES), min_size=0, max_size=12).map("".join)


@pytest.fixture(scope="module")
def encoders() -> dict[str, tuple[Any, Any]]:
    base = train_tokenizer(["Hello there, what is this? It is 12 cats. 你好"], vocab_size=380)
    found = {}
    for name in ("plain", "thinks at the end", "opens the thinking", "system beside the last user"):
        own = tokenizer_for(base, HABITS[name])
        found[name] = (own, build_encoder(copy.deepcopy(own), None, {}, datetime.datetime(2026, 1, 2)))
    return found


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_conversation_is_labelled_right_or_refused(encoders: dict[str, tuple[Any, Any]], data: Any) -> None:
    habit = data.draw(st.sampled_from(sorted(encoders)))
    own, encoder = encoders[habit]
    messages: list[dict[str, str]] = []
    if data.draw(st.booleans()):
        messages.append({"role": "system", "content": "Sys0" + data.draw(texts)})
    for number in range(data.draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"Ask{number}" + data.draw(texts)})
        messages.append({"role": "assistant", "content": f"Say{number}" + data.draw(texts) + "!"})
    row = next(label_rows([RawRow("x", 1, {"messages": messages})], encoder, DataSection(train=["x"]), 8192))
    if row.status == "refused":
        assert habit != "plain", row.reason  # it loses nothing, so a refusal is wrong
        assert "control token" not in row.reason, row.reason
        return
    typed = any(token in m["content"] for m in messages for token in own.get_added_vocab())
    shape = {"messages": messages}
    assert_right(own, shape, row, compare_prompts=not typed)
