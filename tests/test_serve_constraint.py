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
from tunesmith.serve.errors import ApiError

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


def named(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "\u2028x", "{{ x }}", "é" * 9])
def test_a_tools_name_is_text(speaker: Any, name: str) -> None:
    """Any name may be called, and none ends the reply."""
    encoder = speaker.encoder
    form, grammars = reply_format(encoder), Grammars(speaker)
    tool = named(name)
    constraint = grammars.start(grammars.of_calls(form, [tool], None, "tool_choice"), form)
    ids = [
        *encoder.tokenizer.convert_tokens_to_ids(["<tool_call>"]),
        *encoder.tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids,
    ]
    for token in ids:
        assert bool(constraint.mask()[token])
        constraint.accept(token)
    text = ""
    for _ in range(200):
        allowed = constraint.mask().nonzero().flatten().tolist()
        if len(allowed) > 40 or text.endswith("{}"):  # the arguments
            break
        assert allowed, text
        assert not any(one in encoder.stop_ids for one in allowed), text
        longest = max(allowed, key=lambda one: len(encoder.tokenizer.decode([one])))
        text += encoder.tokenizer.backend_tokenizer.id_to_token(longest)
        constraint.accept(longest)
    assert '"arguments"' in text


@pytest.mark.parametrize("name", ["<|im_end|>", "a</tool_call>"])
def test_a_tools_name_with_a_control_token(speaker: Any, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        Grammars(speaker).of_calls(reply_format(speaker.encoder), [named(name)], None, "tool_choice")
    assert (caught.value.status, caught.value.param) == (400, "tools")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["<|im_end|>"]},
        {"$ref": "#"},
        {"anyOf": [{"type": "string", "pattern": f"a{{{size}}}"} for size in range(3000)]},
    ],
)
def test_a_schema_that_cannot_be_followed_gives_no_reply(speaker: Any, schema: Any) -> None:
    """The row ends with an error: what was written so far must not pass as JSON of the schema."""
    form, grammars = reply_format(speaker.encoder), Grammars(speaker)
    constraint = grammars.start(grammars.of_schema(json.dumps(schema), "response_format"), form)
    batcher = Batcher(speaker)
    batcher.submit(Request(speaker.encoder.encode_prompt(*read_question("hi")), Sampling(50, 0), constraint=constraint))
    while batcher.has_work:
        for token in batcher.step():
            last = token
    assert last.finish_reason == "error"
    assert last.error.code in ("constraint-dead-end", "constraint-failed")
    assert len(str(last.error)) < 200  # without the library's dump of its state


def test_json_of_any_schema_ends_by_itself(speaker: Any) -> None:
    for schema in ({"type": "object"}, {"type": "boolean"}, {"enum": [1, 2]}, {"type": "array", "maxItems": 2}):
        form, grammars = reply_format(speaker.encoder), Grammars(speaker)
        grammar = grammars.of_schema(json.dumps(schema), "response_format")
        ends = 0
        for seed in range(4):
            batcher, text = Batcher(speaker), ""
            ids = speaker.encoder.encode_prompt(*read_question("hi"))
            batcher.submit(Request(ids, Sampling(300, 1.0, seed), constraint=grammars.start(grammar, form)))
            while batcher.has_work:
                for token in batcher.step():
                    text += token.text
            assert token.finish_reason in ("stop", "length")
            if token.finish_reason == "stop":
                json.loads(text)
                ends += 1
        assert ends


@pytest.mark.parametrize("parameters", [True, "x", [1], 5])
def test_parameters_that_are_no_schema(speaker: Any, parameters: Any) -> None:
    form, grammars = reply_format(speaker.encoder), Grammars(speaker)
    with pytest.raises(ApiError) as caught:
        grammars.of_calls(form, [named("f", parameters)], None, "tool_choice")
    assert (caught.value.status, caught.value.code) == (400, "unsupported-schema")
