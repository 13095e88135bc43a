"""Grammars of tool calls with control tokens of their own, and JSON that begins after the reasoning."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from transformers import AddedToken

from conftest import WORDS, build_model, tiny_config
from serving import TEMPLATE, WEATHER
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.reply_parts import reply_format
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.chats import read_question
from tunesmith.serve.constraint import Grammars

COUNT = {
    "type": "function",
    "function": {
        "name": "数数",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "maximum": 9}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def speaker() -> Any:
    tokenizer = train_tokenizer([WORDS] * 20, vocab_size=420)
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in tags])
    tokenizer.chat_template = TEMPLATE
    encoder = build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))
    config = tiny_config("qwen3", len(tokenizer), initializer_range=0.02, eos_token_id=tokenizer.eos_token_id)
    return Speaker(build_model(config).eval(), encoder, 512)


def test_a_call_has_the_templates_own_tokens(speaker: Any) -> None:
    form, grammars = reply_format(speaker.encoder), Grammars(speaker)
    grammar = grammars.of_calls(form, [WEATHER, COUNT], "数数", "tool_choice")
    ids = speaker.encoder.encode_prompt(*read_question("hi", [WEATHER, COUNT]))
    batcher, text = Batcher(speaker), ""
    batcher.submit(Request(ids, Sampling(200, 1.0, 3), constraint=grammars.start(grammar, form)))
    while batcher.has_work:
        for token in batcher.step():
            text += token.text
    assert token.finish_reason == "stop"
    (call,) = form.parse(text, True, [COUNT]).tool_calls
    assert call.name == "数数"
    assert set(call.arguments) == {"n"}


def test_json_begins_after_the_reasoning(speaker: Any) -> None:
    encoder = speaker.encoder
    form = reply_format(encoder, {"open": True})
    grammars = Grammars(speaker)
    grammar = grammars.of_schema(json.dumps({"type": "object"}), "response_format")
    constraint = grammars.start(grammar, form)
    stop = encoder.stop.id
    for token in encoder.encode_ids(["hello to you</think>"])[0]:
        mask = constraint.mask()
        assert bool(mask[token])
        assert not bool(mask[stop])
        assert int(mask.sum()) > 400
        constraint.accept(token)
    allowed = [encoder.tokenizer.decode([token]) for token in constraint.mask().nonzero().flatten().tolist()]
    assert allowed
    assert all(text.startswith("{") for text in allowed)
