"""Small templates that rewrite texts, and rows with unusual texts: used correctly or refused, never silently wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from proof_shapes import HARD, ID, OSLO, TRIP, WEATHER, call, tool
from test_matrix import SYSTEM, a, encoder_for, tokenizer_for, u
from test_proof_matrix import find_wrong
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.encoder import Encoder
from tunesmith.sources.read import RawRow

Row = dict[str, Any]
_CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}ARGUMENTS{{ '</call>' }}{% endfor %}"
_TOOLS = "{% for t in tools or [] %}{{ t | tojson + '\n' }}{% endfor %}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chat(
    content: str = "m.content", arguments: str = "{{ c.function.arguments | tojson }}", tools: str = _TOOLS
) -> str:
    """ChatML with the given expressions for content and for arguments of calls."""
    thought = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    turn = (
        "{{ '<|im_start|>' + m.role + '\n' }}"
        + thought
        + "{{ "
        + content
        + " }}"
        + _CALLS.replace("ARGUMENTS", arguments)
    )
    return tools + "{% for m in messages %}" + turn + "{{ '<|im_end|>\n' }}{% endfor %}" + _ASK


def open_encoder(tokenizer: Any, template: str) -> tuple[Any, Encoder]:
    own = tokenizer_for(tokenizer, template)
    return own, encoder_for(own)


def label(encoder: Encoder, row: Row, **data: Any) -> LabelledRow:
    return next(label_rows([RawRow("x", 1, copy.deepcopy(row))], encoder, DataSection(train=["x"], **data), 100_000))


def outcome(tokenizer: Any, template: str, row: Row) -> str:
    """How a row was used, verified; or the code and reason of its refusal."""
    own, encoder = open_encoder(tokenizer, template)
    labelled = label(encoder, row)
    if labelled.status == "refused":
        return f"{labelled.code}: {labelled.reason}"
    assert not list(find_wrong(own, encoder, row, labelled))
    return labelled.how


def called(arguments: Any) -> Row:
    turns = [u("Go."), a("", tool_calls=[call("plan_trip", arguments, ID)]), tool("done", ID), a("It is planned.")]
    return {"messages": turns, "tools": [TRIP]}


PLAIN: Row = {"messages": [SYSTEM, u("What, so?"), a("That is it."), u("And now?"), a("Nothing at all.")]}
ODD_TEXTS = {
    "private use": "\U000f0000\U000f0001 and \U0010fffd",
    "rare ideographs": "\U00020000\U00020001 and \U0002a6d6",
    "both kinds of marks": "\U000f0000 and \U00020000",
    "noncharacters": "\ufffe\uffff\U0001fffe",
    "JSON": '{"role": "assistant", "content": "That is it."}',
    "JSON text of a list": '["a", {"b": null}]',
    "repr": "{'role': 'assistant'}",
    "HTML": "<b>a &amp; b</b> &lt;i&gt;",
    "the template's own words": "user\nassistant\n",
    "a word of the template": "assistant",
    "one letter": "a",
    "one letter of the template": "s",
    "Jinja": "{{ messages }} {% if x %}",
    "zero width": "a\u200db\u200e\ufeff",
    "line ends": "a\r\nb\u2028c\u0085d",
    "escapes": "\\n \\u0041 \\\\",
    "null character": "a\x00b",
    "long": "so " * 3000 + "on",
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_TEXTS)
@pytest.mark.parametrize("way", ["m.content", "m.content|tojson", "m.content|e", "m.content|trim", "'%r' % m.content"])
def test_odd_texts_are_found_or_refused(tokenizer: Any, odd: str, way: str) -> None:
    text = ODD_TEXTS[odd]
    row = {"messages": [{**SYSTEM, "content": text}, u(text), a(text), u("b " + text), a(text + " b")]}
    found = outcome(tokenizer, chat(way), row)
    if way == "m.content" and odd != "both kinds of marks":
        assert found == "as_rendered"


@pytest.mark.parametrize(
    "texts", [["Yes."] * 4, ["", "Yes.", " ", "No."], ["a", "aa", "aaa", "a a"], ["\n\n", "x", "\t", "y"]]
)
def test_equal_empty_and_nested_texts(tokenizer: Any, texts: list[str]) -> None:
    row = {"messages": [u(texts[0]), a(texts[1]), u(texts[2]), a(texts[3])]}
    assert outcome(tokenizer, chat(), row) == "as_rendered"


def test_very_many_parts(tokenizer: Any) -> None:
    many = [turn for number in range(700) for turn in (u(f"Q{number}"), {**a(f"A{number}"), "loss_weight": 0})]
    _, encoder = open_encoder(tokenizer, chat())
    row = label(encoder, {"messages": [*many, u("Last?"), a("Last.")]})
    assert (row.how, row.samples[0].loss_mask.sum()) == (
        "as_rendered",
        len(encoder.tokenizer("Last.")["input_ids"]) + 1,
    )


WRITES = {  # expression for content -> how the row is used or why it is refused
    "m.content": "as_rendered",
    "m.content|trim": "as_rendered",
    "m.content|tojson": "as_rendered",
    "m.content|e": "as_rendered",
    "m.content|upper": "rewrites",
    "m.content|capitalize": "rewrites",
    "m.content|reverse": "rewrites",
    "m.content|list|sort|join": "rewrites",
    "m.content|list|join(' ')": "parts-not-traced",
    "m.content|striptags": "as_rendered",
    "m.content|replace('t', '')": "rewrites",
    "m.content|replace('is', 'was')": "rewrites",
    "m.content.replace('it', '')": "rewrites",
    "m.content|title": "",
    "m.content[:6]": "parts-not-traced",
    "m.content[2:]": "",
    "m.content|truncate(8, True, '')": "",
    "m.content ~ ' ' ~ m.content|length": "",
    "m.content|string": "as_rendered",
    "m.content ~ ' ' ~ m.content": "as_rendered",
    "m.content.split(' ')|sort|join(' ')": "",
    "m.content|wordwrap(4)": "",
    "[m.content]": "as_rendered",
    "{'text': m.content}|tojson(indent=2)": "as_rendered",
    "{'z': m.content, 'a': m.content}|tojson(sort_keys=True)": "as_rendered",
}


@pytest.mark.parametrize("way", WRITES)
def test_what_a_template_makes_of_texts(tokenizer: Any, way: str) -> None:
    kept = f"m.content if 'tunesmith' in m.content or m.content in ('Hi', 'tsasked') else ({way})"
    found = outcome(tokenizer, chat(kept), PLAIN)
    assert WRITES[way] in found
    if way not in ("m.content", "m.content|string") and "as_rendered" not in WRITES[way]:
        assert found not in ("as_rendered", "unrolled", "composed")


ARGUMENTS = {  # expression for arguments -> whether all of them are written
    "{{ c.function.arguments | tojson }}": True,
    "{{ c.function.arguments | tojson(indent=4) }}": True,
    "{{ c.function.arguments | tojson(sort_keys=True) }}": True,
    "{{ c.function.arguments | tojson(ensure_ascii=True) }}": False,  # it does, but its marks cannot be read
    "{{ c.function.arguments | tojson(separators=(',', ':')) }}": True,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' }}{{ v if v is string else v | tojson }}\n{% endfor %}": True,
    "{% for k, v in c.function.arguments | dictsort %}{{ k ~ '=' }}{{ v if v is string else v | tojson }}\n{% endfor %}": True,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' }}{{ v | tojson if v }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() if v is not none %}{{ k ~ '=' ~ v | tojson }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (v | tojson if v is not none else '') }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() %}{{ k | upper ~ '=' ~ v | tojson }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (v | int if v is number else v | tojson) }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (v | round if v is float else v | tojson) }}\n{% endfor %}": False,
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (v | length if v is mapping else v | tojson) }}\n{% endfor %}": False,
    "{{ c.function.arguments.keys() | list | tojson }}": False,
    "{{ c.function.arguments.values() | list | tojson }}": False,
    "{{ c.function.arguments.values() | list | join(', ') }}": False,
}  # fmt: skip


@pytest.mark.parametrize("way", ARGUMENTS)
def test_what_a_template_makes_of_arguments(tokenizer: Any, way: str) -> None:
    found = outcome(tokenizer, chat(arguments=way), called({"city": "Oslo", **HARD, "cit": "Rome", "city2": 3}))
    assert (found == "as_rendered") is ARGUMENTS[way], found


@pytest.mark.parametrize("value", [None, False, True, 0, 1, 3, 3.5, -1, 10**20, 1e-7, 0.1, 7340000000017])
def test_one_scalar_by_its_value(tokenizer: Any, value: Any) -> None:
    assert outcome(tokenizer, chat(), called({"x": value})) == "as_rendered"
    falsy = chat(
        arguments="{% for k, v in c.function.arguments.items() %}{{ k ~ '=' }}{{ v | tojson if v }}{% endfor %}"
    )
    assert (outcome(tokenizer, falsy, called({"x": value})) == "as_rendered") is bool(value)


def test_a_schema_in_its_own_words_is_named_where_it_leaves_something_out(tokenizer: Any) -> None:
    retold = "{% for t in tools or [] %}{{ t.function.name ~ '(' }}{% for k, v in t.function.parameters.properties.items() %}{{ k ~ ', ' }}{% endfor %}{{ ') ' ~ t.function.description ~ '\n' }}{% endfor %}"
    assert (
        outcome(tokenizer, chat(tools=retold), {"messages": [u("Go."), a("So.")], "tools": [WEATHER]}) == "as_rendered"
    )
    _, encoder = open_encoder(tokenizer, chat(tools=retold))
    row = label(encoder, {"messages": [u("Go."), a("So.")], "tools": [WEATHER]})
    assert row.notes == ("parts of the parameters of a tool are not written by the template",)
    _, encoder = open_encoder(tokenizer, chat())
    assert label(encoder, {"messages": [u("Go."), a("So.")], "tools": [TRIP]}).notes == ()


_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ELSEWHERE = {  # where a template writes a text
    "question inside the reply": (_TURN.replace("m.content", "(messages[0].content + ' ' if m.role == 'assistant' else '') + m.content"), "others-in-reply"),
    "reply again in the next turn": (_TURN.replace("m.content", "(messages[loop.index0 - 1].content + '/' if loop.index0 and m.role == 'user' else '') + m.content"), "unrolled"),
    "reply in the next turn only": (_TURN.replace("m.content", "(messages[loop.index0 - 1].content + '/' if loop.index0 and m.role == 'user' else '') + (m.content if m.role == 'user' or loop.last else '')"), "unrolled"),
    "question behind the reply": ("{% if m.role != 'user' %}" + _TURN + "{% endif %}{% if m.role == 'assistant' %}{{ messages[loop.index0 - 1].content + '\n' }}{% endif %}", "drops its content"),
    "system prompt at the end": ("{% if m.role != 'system' %}" + _TURN + "{% endif %}{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}", "composed"),
    "all turns backwards": ("{% set m = messages[loop.length - loop.index] %}" + _TURN, "composed"),
    "equal turns once": ("{% if loop.first or m.content != messages[loop.index0 - 1].content %}" + _TURN + "{% endif %}", "as_rendered"),
}  # fmt: skip


@pytest.mark.parametrize("place", ELSEWHERE)
def test_where_a_template_writes_what_was_said(tokenizer: Any, place: str) -> None:
    turn, expected = ELSEWHERE[place]
    found = outcome(tokenizer, "{% for m in messages %}" + turn + "{% endfor %}" + _ASK, PLAIN)
    assert expected in found, found


def test_documents_are_written_or_refused(tokenizer: Any) -> None:
    chats = {"messages": [u("Why?"), a("So.")]}
    whole = "{% for d in documents or [] %}{{ d.title ~ ': ' ~ d.text ~ '\n' }}{% endfor %}"
    row = {**chats, "documents": [{"id": "7a", "title": "Salt", "text": "It melts <|im_end|> ice."}]}
    _, encoder = open_encoder(tokenizer, chat(tools=whole))
    labelled = label(encoder, row)
    assert labelled.status == "used"
    assert "a part of a document is not written by the template" in labelled.notes  # its id
    ids = labelled.samples[0].input_ids.tolist()
    assert ids.count(encoder.stop.id) == 2  # that of the document stays text
    assert "It melts <|im_end|> ice." in encoder.tokenizer.decode(ids)
    _, encoder = open_encoder(tokenizer, chat(tools=whole.replace(" ~ d.text", "")))
    lost = label(encoder, row)
    assert (lost.code, "document 1" in lost.reason) == ("context-lost", True)


def test_an_id_that_spells_a_control_token_stays_text(tokenizer: Any) -> None:
    template = chat("(m.tool_call_id or '') + m.content")
    turns = [
        u("Go."),
        a("", tool_calls=[call("get_weather", OSLO, "x<|im_end|>")]),
        tool("wet", "x<|im_end|>"),
        a("So."),
    ]
    _, encoder = open_encoder(tokenizer, template)
    row = label(encoder, {"messages": turns, "tools": [WEATHER]})
    assert row.samples[0].input_ids.tolist().count(encoder.stop.id) == 4


def test_the_variables_of_a_row_are_those_of_its_prompt(tokenizer: Any) -> None:
    empty = "{% if shut is defined and shut %}{{ '<think></think>' }}{% endif %}"
    turn = (
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + empty
        + "{% endif %}{{ m.content + '<|im_end|>\n' }}"
    )
    ask = _ASK.replace("{% endif %}", empty + "{% endif %}")
    _, encoder = open_encoder(tokenizer, "{% for m in messages %}" + turn + "{% endfor %}" + ask)
    rows = [{"messages": [u(f"Q{n}?"), a("A.")], "chat_template_kwargs": {"shut": n == 49}} for n in range(50)]
    raw = [RawRow("x", number, row) for number, row in enumerate(rows, 1)]
    *_, last = label_rows(raw, encoder, DataSection(train=["x"]), 512)
    [sample] = last.samples
    assert encoder.tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "A.<|im_end|>"


@pytest.mark.parametrize("prefill", ["Say so ", "Say <|im_end|> so ", "<|im_end|><|im_end|> "])
def test_a_prefill_is_context_to_the_letter(tokenizer: Any, prefill: str) -> None:
    _, encoder = open_encoder(tokenizer, chat())
    row = label(encoder, {"prompt": [u("Q?"), a(prefill)], "completion": [a("and on.")]})
    [sample] = row.samples
    assert encoder.tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "and on.<|im_end|>"


def test_a_prefill_of_thoughts_is_not_trained(tokenizer: Any) -> None:
    row = {"prompt": [u("Q?"), a("<think>\nhm\n</think>\n\n")], "completion": [a("Yes.")]}
    _, encoder = open_encoder(tokenizer, chat())
    assert label(encoder, row).code == "thoughts-in-prefill"
    plain = "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK
    _, encoder = open_encoder(tokenizer, plain)
    [sample] = label(encoder, row).samples
    assert encoder.tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "Yes.<|im_end|>"


def test_flags_that_a_template_takes_out_of_a_question_are_no_loss(tokenizer: Any) -> None:
    way = "(m.content|replace('/no_think', ''))"
    assert (
        outcome(tokenizer, chat(way), {"messages": [{**SYSTEM, "content": "Brief. /no_think"}, u("Q?"), a("A.")]})
        == "as_rendered"
    )
    assert "rewrites" in outcome(tokenizer, chat(way), {"messages": [u("Q?"), a("Say /no_think to it.")]})
