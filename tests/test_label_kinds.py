"""Rows with more than turns: prefills, untrained parts, segments, variables, documents, long texts."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import build_model, chat_row, tiny_config
from tunesmith.config.data_keys import DataSection
from tunesmith.data.check import check_rows
from tunesmith.data.labelling import label_rows
from tunesmith.data.labels import NOTE_UNKNOWN
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.call_ids import NOTE_IDS
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.longtext import PIECE, encode_long
from tunesmith.model.save import set_stop_token
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import RawRow
from tunesmith.sources.rowsize import RowTooLarge

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Any, template: str, control_text: str = "plain") -> Encoder:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return build_encoder(own, None, {}, datetime.datetime(2026, 1, 2), control_text)


def label(encoder: Encoder, row: Any, max_seq_len: int = 4096, **keys: Any) -> LabelledRow:
    data = DataSection(train=["x"], **keys)
    return next(label_rows([RawRow("x.jsonl", 1, row)], encoder, data, max_seq_len))


def trained(encoder: Encoder, row: LabelledRow) -> str:
    """Trained tokens as text, with a bar where they are not contiguous."""
    pieces = []
    for sample in row.samples:
        places = np.flatnonzero(sample.loss_mask)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            pieces.append(encoder.tokenizer.decode(sample.input_ids[run]))
    return " | ".join(pieces)


def test_a_prefill_is_part_of_the_prompt(encoder: Encoder) -> None:
    row = label(
        encoder,
        {"prompt": [{"role": "user", "content": "What is the answer?"}, {"role": "assistant", "content": "The answer"}],
         "completion": [{"role": "assistant", "content": " is forty two."}]},
    )  # fmt: skip
    assert row.status == "used", row.reason
    assert trained(encoder, row) == " is forty two.<|im_end|>"


def test_a_prefill_whose_border_a_token_would_span_is_encoded_apart(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, CHATML)
    row = label(
        encoder,
        {"prompt": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answ"}],
         "completion": [{"role": "assistant", "content": "er is forty two."}]},
    )  # fmt: skip
    assert (row.status, row.how) == ("used", "composed")
    assert trained(encoder, row) == "er is forty two.<|im_end|>"
    [sample] = row.samples
    first = int(sample.loss_mask.argmax())
    asked = encoder.encode_texts(["<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nThe answ"])[0].ids
    assert sample.input_ids[:first].tolist() == asked


def test_parts_of_a_turn_that_are_not_trained(encoder: Encoder) -> None:
    """Axolotl's train_detail: characters begin_offset to end_offset, both included."""
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "The quick brown fox jumps",
         "train_detail": [{"begin_offset": 4, "end_offset": 15, "train": False}]},
    ]  # fmt: skip
    row = label(encoder, {"messages": turns})
    assert row.status == "used", row.reason
    text = trained(encoder, row)
    assert "quick" not in text
    assert "jumps<|im_end|>" in text
    check = check_rows([row], [], encoder, DataSection(train=["x"]), 4096)
    assert "the stop token is not trained" not in [finding.what for finding in check.findings.sorted()]


def test_segments_are_trained_as_the_row_says(tokenizer: Any) -> None:
    parts = [
        {"label": False, "text": "<|im_start|>user\nQ<|im_end|>\n"},
        {"label": True, "text": "The answer<|im_end|>"},
    ]
    row = label(with_template(tokenizer, CHATML, "allow"), {"segments": parts}, control_text="allow")
    assert (row.status, row.how) == ("used", "segments")
    assert trained(with_template(tokenizer, CHATML), row) == "The answer<|im_end|>"
    refused = label(with_template(tokenizer, CHATML), {"segments": parts})
    assert (refused.status, refused.code) == ("refused", "segments-control-text")
    assert "--data.control_text allow" in refused.reason


def test_a_rows_own_variables_reach_the_template(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, "{{ mood }}:" + CHATML)
    row = label(encoder, {**chat_row("Q", "A"), "chat_template_kwargs": {"mood": "brief"}})
    assert row.status == "used", row.reason
    assert encoder.tokenizer.decode(row.samples[0].input_ids).startswith("brief:")
    lost = label(with_template(tokenizer, CHATML), {**chat_row("Q", "A"), "chat_template_kwargs": {"mood": "brief"}})
    assert (lost.status, lost.code, "mood" in lost.reason) == ("refused", "variable-not-read", True)


def test_documents_reach_the_template_or_refuse_the_row(tokenizer: Any) -> None:
    documents = [{"title": "T", "text": "Facts of the matter."}]
    reads = with_template(tokenizer, "{% for d in documents or [] %}{{ d.text }}{% endfor %}" + CHATML)
    row = label(reads, {**chat_row("Q", "A"), "documents": documents})
    assert "Facts of the matter." in reads.tokenizer.decode(row.samples[0].input_ids)
    lost = label(with_template(tokenizer, CHATML), {**chat_row("Q", "A"), "documents": documents})
    assert (lost.status, lost.code, "documents" in lost.reason) == ("refused", "variable-not-read", True)


@pytest.mark.parametrize("extra", ["tools", "documents", "chat_template_kwargs"])
def test_without_a_template_nothing_beside_the_texts_is_lost(tokenizer: Any, extra: str) -> None:
    encoder = build_encoder(copy.deepcopy(tokenizer), "none", {}, datetime.datetime(2026, 1, 2))
    value: Any = {"tools": [{"name": "f"}], "documents": ["d"], "chat_template_kwargs": {"x": 1}}[extra]
    row = label(encoder, {**chat_row("Q", "A"), extra: value})
    assert (row.status, row.code, extra in row.reason) == ("refused", "needs-template", True)


def test_characters_that_the_tokenizer_cannot_write_are_found() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Hello": 2, "you": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    )
    encoder = with_template(tokenizer, template)
    row = label(encoder, chat_row("Hello", "you 🙂"))
    assert NOTE_UNKNOWN in row.notes
    check = check_rows([row], [], encoder, DataSection(train=["x"]), 4096)
    assert [f.level for f in check.findings.sorted() if f.what == NOTE_UNKNOWN] == ["error"]
    assert NOTE_UNKNOWN not in label(encoder, chat_row("🙂", "you")).notes  # the question is not trained


def test_a_row_above_the_bound_is_refused_and_the_file_goes_on(encoder: Encoder) -> None:
    rows = [RawRow("x", 1, RowTooLarge(50_000_000, 16.0)), RawRow("x", 2, chat_row("Q", "A"))]
    large, used = label_rows(rows, encoder, DataSection(train=["x"]), 4096)
    assert (large.status, used.status) == ("refused", "used")
    assert (large.code, "data.max_row_mb" in large.reason) == ("row-too-large", True)


def test_few_books_are_in_memory_at_once(encoder: Encoder) -> None:
    """A row of raw text may be a whole book; each is labelled before many more are read."""
    num_read = 0

    def books() -> Iterator[RawRow]:
        nonlocal num_read
        for number in range(40):
            num_read += 1
            yield RawRow(f"{number}.txt", 1, {"text": "the quick brown fox\n" * 20_000})

    assert next(label_rows(books(), encoder, DataSection(train=["x"]), 256)).status == "used"
    assert num_read <= 6


def test_a_long_text_in_pieces_has_the_ids_of_the_whole(encoder: Encoder) -> None:
    backend = encoder.tokenizer.backend_tokenizer
    text = "".join(f"Line {number}: the quick  brown fox 狐狸 🙂 jumps\n\n" for number in range(PIECE // 12))
    assert len(text) > 3 * PIECE
    found, whole = encode_long(backend, text), backend.encode(text, add_special_tokens=False)
    assert list(found.ids) == whole.ids
    assert found.offsets == whole.offsets
    assert found.char_to_token(text.index("狐", PIECE)) == whole.char_to_token(text.index("狐", PIECE))


def test_a_long_text_that_cannot_be_cut_is_encoded_whole(encoder: Encoder) -> None:
    backend, text = encoder.tokenizer.backend_tokenizer, "a" * (3 * PIECE)
    assert list(encode_long(backend, text).ids) == backend.encode(text, add_special_tokens=False).ids
    row = label(encoder, chat_row("Q", "a" * (3 * PIECE)), max_seq_len=1 << 22)
    assert row.status == "used"


def test_a_long_reply_has_the_labels_of_a_short_one(encoder: Encoder) -> None:
    words = "the quick brown fox jumps over the lazy dog\n" * (PIECE // 16)
    row = label(encoder, chat_row("What is it?", words + "end."), max_seq_len=1 << 22)
    assert trained(encoder, row) == words + "end.<|im_end|>"


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
    "{% if not m.tool_calls %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_call_that_ends_in_a_token_of_its_own_stops_there(tokenizer: Any, tmp_path: Any) -> None:
    """gpt-oss ends calls with <|call|>, words with <|return|>; both are trained, once, and both stop generation."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    encoder = with_template(own, CALLS)
    assert (encoder.stop.text, encoder.call_stop.text) == ("<|im_end|>", "<|call|>")
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": None, "y": 3}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "content": "R", "tool_call_id": "a"}, {"role": "assistant", "content": "A"}]  # fmt: skip
    row = label(encoder, {"messages": turns})
    assert trained(encoder, row) == 'f{"x": null, "y": 3}<|call|> | A<|im_end|>'
    model = build_model(tiny_config("llama", len(own)))
    set_stop_token(model, encoder)
    assert model.generation_config.eos_token_id == encoder.stop_ids


@pytest.mark.parametrize("value", [12, 0, 1.5, -3, True, False, None, [1, 2], {"n": 3, "s": "x"}, 200000])
def test_numbers_and_truths_of_a_call_are_no_reason_to_refuse_it(tokenizer: Any, value: Any) -> None:
    calls = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
    encoder = with_template(tokenizer, CHATML.replace("<|im_end|>", calls, 1))
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": value, "b": 12}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = label(encoder, {"messages": turns})
    assert row.status == "used", row.reason


ASKS_FOR_IDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "{% if c.id is undefined or c.id|length != 9 %}{{ raise_exception('ids of 9 letters, please') }}{% endif %}"
    "{{ c.function | tojson }} {{ c.id }}{% endfor %}{% if m.role == 'tool' %} for {{ m.tool_call_id }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_asks_for_ids_gets_them_where_the_row_has_none(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, ASKS_FOR_IDS)
    assert encoder.template is not None
    assert encoder.renderer().habits.needs_ids
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call, call]},
             {"role": "tool", "content": "R"}, {"role": "tool", "content": "S"},
             {"role": "assistant", "content": "A"}]  # fmt: skip
    row = label(encoder, {"messages": turns})
    assert NOTE_IDS in row.notes
    text = encoder.tokenizer.decode(row.samples[0].input_ids)
    ids = re.findall(r"\} (\w{9})", text)
    assert len(set(ids)) == 2
    assert re.findall(r"[RS] for (\w{9})", text) == ids
    assert [s.input_ids.tolist() for s in label(encoder, {"messages": turns}).samples] == [
        s.input_ids.tolist() for s in row.samples
    ]
    turns[1]["tool_calls"] = [{**call, "id": "abcdefghi"}]
    turns[2]["tool_call_id"] = "abcdefghi"
    own = label(encoder, {"messages": [*turns[:3], turns[4]]})
    assert own.status == "used", own.reason
    assert NOTE_IDS not in own.notes
    assert "abcdefghi" in encoder.tokenizer.decode(own.samples[0].input_ids)
