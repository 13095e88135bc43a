"""JSON, tool calls and repetition: right ones, near misses, broken ones and hostile ones."""

from __future__ import annotations

import copy
import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import save_folder, tiny_config, write_jsonl

pytest.importorskip("jsonschema")
pytest.importorskip("sacrebleu")

from tunesmith.evaluation.calls import fits_schema, score_calls
from tunesmith.evaluation.forms import (
    INVALID,
    distinct_share,
    is_loop,
    is_same_json,
    load_json,
    read_like,
    read_reference,
)
from tunesmith.evaluation.records import EvaluationFolder, ReplyRecord, read_evaluation, read_replies
from tunesmith.evaluation.replies import Asked, ReplyScorer
from tunesmith.evaluation.texts import TextScorer
from tunesmith.generation.reply_parts import ToolCall, reply_format
from tunesmith.model.tokenizer import build_encoder

TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time"}},
]


def call(name: str, arguments: Any) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(name, arguments, text)


ROME = call("weather", {"city": "Rome", "days": 2})


@pytest.mark.parametrize(
    ("calls", "scores"),
    [
        ([ROME], (1, 1, 1, 1)),
        ([call("weather", '{"days": 2.0, "city": "Rome"}')], (1, 1, 1, 1)),
        ([call("weather", {"city": "Paris", "days": 2})], (1, 1, 1, 0)),
        ([call("weather", {"days": 2})], (1, 1, 0, 0)),
        ([call("weather", {"city": "Rome", "days": "2"})], (1, 1, 0, 0)),
        ([call("weather", {"city": "Rome", "days": True})], (1, 1, 0, 0)),
        ([call("weather", '{"city": "Rome", "days": 2')], (1, 1, 0, 0)),
        ([call("weather", '["Rome"]')], (1, 1, 0, 0)),
        ([call("wether", ROME.arguments)], (1, 0, 0, 0)),
        ([ROME, call("time", {"x": 1})], (1, 1, 1, 0)),
        ([ROME, ROME], (1, 1, 1, 0)),
        ([], (0, 0, 0, 0)),
    ],
)
def test_calls_are_scored_by_name_schema_and_reference(calls: list[ToolCall], scores: tuple[int, ...]) -> None:
    names = ("tool_choice", "tool_name", "tool_arguments", "tool_equal")
    assert score_calls(calls, [ROME], TOOLS) == dict(zip(names, map(float, scores), strict=True))


def test_calls_of_rows_without_tools_or_without_calls() -> None:
    assert score_calls([], [], TOOLS) == {"tool_choice": 1.0}
    assert score_calls([ROME], [], TOOLS) == {"tool_choice": 0.0}
    assert score_calls([ROME], [ROME], []) == {"tool_equal": 1.0}
    two = [ROME, call("time", {})]
    assert score_calls(two[::-1], two, TOOLS)["tool_equal"] == 1.0  # parallel calls have no order


@pytest.mark.parametrize(
    ("schema", "arguments", "fits"),
    [
        (None, {"any": 1}, True),
        ({}, {"any": 1}, True),
        (True, {}, True),
        ({"type": "object"}, [1], False),
        ({"properties": {"a": {"enum": ["x", 1]}}}, {"a": "y"}, False),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, {"type": "string"}]}}}, {"a": None}, True),
        ({"$defs": {"c": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/c"}}}, {"a": 1}, False),
        ({"type": "dict"}, {"a": 1}, None),
        ({"properties": {"a": {"type": "str"}}}, {"a": 1}, None),
        ({"properties": {"a": {"$ref": "https://example.invalid/x"}}}, {"a": 1}, None),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, {"a": 1}, None),
        ({"$ref": "#"}, {"a": 1}, None),
        ({"properties": {"a": {"pattern": "("}}}, {"a": "x"}, None),
        ({"properties": {"a": {"pattern": "^[a-z]+$"}}}, {"a": "1"}, False),
        ({"patternProperties": {"^n": {"type": "integer"}}}, {"n1": "x"}, False),
        ("object", {"a": 1}, None),
        ([1], {}, None),
    ],
)
def test_schemas_of_every_kind(schema: Any, arguments: Any, fits: bool | None) -> None:
    assert fits_schema(arguments, schema) is fits


def test_a_pattern_that_never_ends_is_given_up() -> None:
    began = time.monotonic()
    assert fits_schema({"a": "b" * 60 + "!"}, {"properties": {"a": {"pattern": "^((b|bb)+)+$"}}}) is not True
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("others", [{"additionalProperties": False}, {"unevaluatedProperties": False}])
def test_a_pattern_of_names_that_never_ends_is_given_up(others: dict[str, Any]) -> None:
    began = time.monotonic()
    schema = {"patternProperties": {"^((b|bb)+)+$": {}}, **others}
    assert fits_schema({"b" * 60 + "!": 1}, schema) is not True
    assert time.monotonic() - began < 3
    assert fits_schema({"x": 1, "y1": 2}, {"patternProperties": {"^y": {}}, "additionalProperties": False}) is False
    assert fits_schema({"x": 1}, {"patternProperties": {"^y": {}}, "additionalProperties": {"type": "integer"}}) is True


def test_references_that_multiply_are_given_up() -> None:
    began = time.monotonic()
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    assert fits_schema({"a": 1}, {"$ref": "#/$defs/d0", "$defs": {**twice, "d40": {}}}) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("reference", "reply", "is_valid", "is_equal"),
    [
        ('{"a": 1}', '{ "a" : 1.0 }', True, True),
        ('{"a": 1}', '{"a": true}', True, False),
        ('{"a": 1}', '{"a": 1', False, False),
        ('{"a": 1}', '```json\n{"a": 1}\n```', False, False),
        ('```json\n{"a": 1}\n```', '```\n{"a": 1}\n```', True, True),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True, True),
        ("[1, 2]", "[2, 1]", True, False),
        ('{"a": 1}', '{"a": NaN}', False, False),
        ('{"a": 1}', '{"a": 1, "a": 1}', False, False),
        ('{"a": 1}', "[" * 100_000, False, False),
        ('{"a": 1}', '{"a": ' + "9" * 5000 + "}", False, False),
        ('{"a": 1}', "", False, False),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}', True, True),
    ],
)
def test_json_replies(reference: str, reply: str, is_valid: bool, is_equal: bool) -> None:
    wanted = read_reference(reference)
    assert wanted is not None
    found = read_like(wanted, reply)
    assert (found is not INVALID) is is_valid
    assert (found is not INVALID and is_same_json(found, wanted.value)) is is_equal


@pytest.mark.parametrize(
    "text", ["42", '"text"', "null", "Use {a: 1}", '{"a": 1} and more', "", "```json\n{}\n``` done"]
)
def test_other_references_are_not_json(text: str) -> None:
    assert read_reference(text) is None


def test_repetition() -> None:
    assert distinct_share("a b a b", 1) == 0.5
    assert distinct_share("a b a b", 2) == pytest.approx(2 / 3)
    assert distinct_share("你好你好", 1) == 0.5
    assert distinct_share("word", 2) is distinct_share("", 1) is None
    assert is_loop("I think so. " + "no no " * 20)
    assert is_loop("啊" * 40)
    assert not is_loop("Hello!!!!!!")
    assert not is_loop("One two three four five six seven eight nine ten eleven twelve.")
    assert load_json("{}") == {}


@pytest.fixture
def scorer(tokenizer: Any) -> ReplyScorer:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    encoder = build_encoder(made, None, {}, datetime.datetime(2026, 1, 2))
    return ReplyScorer(TextScorer("13a"), reply_format(encoder))


def scored(scorer: ReplyScorer, reply: str, reference: str, tools: Any = ()) -> ReplyRecord:
    asked = Asked(0, "a:1", 0, [1], reference, 1, tuple(tools), bool(tools), 0)
    return scorer.score(ReplyRecord("m", "a:1", 0, "text", "", reply, reference, True, 1, 1), asked)


def written(name: str, arguments: str) -> str:
    """A call as the template writes it."""
    return f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_calls_in_text_are_read_in_the_shape_of_the_template(scorer: ReplyScorer) -> None:
    right = written("weather", '{"city": "Rome"}')
    record = scored(scorer, right, right, TOOLS)
    assert record.kind == "tool_call"
    assert record.has_tools
    assert {name: record.scores[name] for name in ("tool_choice", "tool_name", "tool_arguments", "tool_equal")} == {
        "tool_choice": 1, "tool_name": 1, "tool_arguments": 1, "tool_equal": 1}  # fmt: skip
    assert record.scores["exact_match"] == 1
    for reply, failed in (
        ("No tool.", "tool_choice"),
        (written("wether", '{"city": "Rome"}'), "tool_name"),
        (written("weather", '{"town": "Rome"}'), "tool_arguments"),
        (right[: len(right) // 2], "tool_equal"),
        (written("weather", '{"city": "Bonn"}'), "tool_equal"),
    ):
        assert scored(scorer, reply, right, TOOLS).scores[failed] == 0, reply
    text = scored(scorer, "It rains.", "It rains.", TOOLS)
    assert (text.kind, text.scores["tool_choice"]) == ("text", 1)
    assert "tool_equal" not in text.scores
    without = scored(scorer, right, right)
    assert (without.kind, without.scores["exact_match_strict"]) == ("text", 1)


def test_a_model_is_scored_on_rows_with_tools(run, tmp_path: Path, tokenizer: Any) -> None:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    model = save_folder(tmp_path / "m", tiny_config("qwen3", initializer_range=0.02), made)
    asked = [{"role": "user", "content": "What is the answer?"}]
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": TOOLS},
        {"messages": [*asked, {"role": "assistant", "content": "Rome."}], "tools": TOOLS},
        {"messages": [*asked, {"role": "assistant", "content": "42"}]},
    ]
    data = write_jsonl(tmp_path / "tools.jsonl", rows)
    code, out, err = run("evaluate", model, "--data", data, "--max-new-tokens", 8, "--output", tmp_path / "o")
    assert code == 0, err
    scores = read_evaluation(EvaluationFolder(tmp_path / "o")).models[0].scores
    assert {name: scores[name].rows for name in ("tool_choice", "tool_name", "tool_equal")} == {
        "tool_choice": 2, "tool_name": 1, "tool_equal": 1}  # fmt: skip
    kinds = [(record.kind, record.has_tools) for record in read_replies(EvaluationFolder(tmp_path / "o"))]
    assert sorted(kinds) == [("text", False), ("text", True), ("tool_call", True)]
    assert "tool calls" in out
