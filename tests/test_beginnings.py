"""One rendering gives the renderings of all shorter chats, but only where they are equal to rendering them alone."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from test_matrix import SHAPES, a, all_templates, u
from tunesmith.chat_template.beginnings import Tails
from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import ChatTemplate, Renderer, RenderSettings
from tunesmith.rows.conversation import Message

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [u("one?"), a("1."), u("two?"), a("2."), {"role": "tool", "content": "t"}, a("3.")]
LOOP = "{% for m in messages %}"
TURN, END = "[{{ m.role }}]{{ m.content }}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = {  # one rendering is enough
    "a plain loop": LOOP + TURN + END + ASK,
    "a system turn first": "{% if messages[0].role == 'system' %}S{% set messages = messages[1:] %}{% endif %}" + LOOP + TURN + END + ASK,
    "a look back": LOOP + "{% if not loop.first and messages[loop.index0 - 1].role == 'tool' %}t{% endif %}" + TURN + END + ASK,
    "a default": "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = true %}{% endif %}" + LOOP + TURN + END + ASK,
    "a name of its own": "{% set who = 'assistant' %}" + LOOP + TURN + END + "{% if add_generation_prompt %}[{{ who }}]{% else %}</s>{% endif %}",
    "an idle loop": "{% set ns = namespace(q=messages|length) %}{% for m in messages[::-1] %}{% set ns.q = loop.index0 %}{% endfor %}" + LOOP + TURN + END + ASK,
}  # fmt: skip
LOOKING = {  # it is not, or not everywhere
    "the last turn": LOOP + TURN + "{% if loop.last %}!{% endif %}" + END + ASK,
    "the last message": LOOP + TURN + END + "{{ messages[-1].role }}" + ASK,
    "the number of turns": LOOP + TURN + "{{ messages|length }}" + END + ASK,
    "the next role": LOOP + TURN + "{% if loop.nextitem %}{{ loop.nextitem.role }}{% endif %}" + END + ASK,
    "the next role by number": LOOP + TURN + "{{ (messages[loop.index0 + 1] or {}).role }}" + END + ASK,
    "a state at the end": "{% set ns = namespace(n='') %}" + LOOP + TURN + "{% set ns.n = m.content %}" + END + "{{ ns.n }}" + ASK,
    "a list at the end": "{% set said = [] %}" + LOOP + TURN + "{% set _ = said.append(1) %}" + END + "{{ said }}" + ASK,
    "asking inside": LOOP + TURN + "{% if loop.last and add_generation_prompt %}[assistant]{% endif %}" + END,
    "asking before": "{% if add_generation_prompt %}Q{% endif %}" + LOOP + TURN + END + ASK,
    "backwards": "{% for m in messages[::-1] %}" + TURN + END + ASK,
    "the last user": "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}{% endfor %}" + LOOP + "{{ loop.index0 > ns.q }}" + TURN + END + ASK,
    "chosen turns": "{% for m in messages if m.role != 'tool' %}" + TURN + "{% else %}none" + END + ASK,
    "left out turns": LOOP + "{% if m.role == 'tool' %}{% continue %}{% endif %}" + TURN + END + ASK,
}  # fmt: skip


def messages_of(turns: list[dict[str, Any]]) -> list[Message]:
    keys = ("reasoning_content", "name")
    return [
        Message(
            t["role"],
            t["content"],
            tool_calls=tuple(t.get("tool_calls", ())),
            **{k: t[k] for k in keys if k in t},
        )
        for t in turns
    ]


def open_template(text: str) -> Renderer:
    return ChatTemplate(text, "test", SPECIAL).with_settings(RenderSettings(datetime.datetime(2026, 1, 2)))


def trusting(text: str, by: list[dict[str, Any]]) -> Renderer:
    """A template whose tails are taken from one chat without comparison, to test the program analysis alone."""
    renderer, found = open_template(text), {}
    messages = messages_of(by)
    try:
        whole = renderer.watch(renderer.to_turns(messages), ())
        for count, asks in ((1, True), (2, False)):
            if count in whole.ends:
                found[asks] = renderer.render(messages[:count], (), asks)[whole.ends[count] :]
    except TemplateRefused:
        pass
    renderer.__dict__["tails"] = Tails(found.get(False), found.get(True))
    return renderer


def assert_alike(template: Renderer, turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    messages = messages_of(turns)
    try:
        whole = template.render(messages, tools)
    except TemplateRefused:
        with pytest.raises(TemplateRefused):
            template.render_beginnings(messages, tools)
        return
    beginnings = template.render_beginnings(messages, tools)
    assert beginnings.text == whole
    for count in range(1, len(messages)):
        for ask in (False, True):
            try:
                alone = template.render(messages[:count], tools, ask)
            except TemplateRefused:
                continue
            assert beginnings.until(count, ask) == alone, (count, ask)


@pytest.mark.parametrize("name", [*PLAIN, *LOOKING])
def test_beginnings_are_what_rendering_them_gives(name: str) -> None:
    text = {**PLAIN, **LOOKING}[name]
    assert_alike(trusting(text, CHAT), [u("other?"), *CHAT[1:], u("and?"), a("yes")], [])


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_template_is_rendered_once(name: str) -> None:
    beginnings = open_template(PLAIN[name]).render_beginnings(messages_of(CHAT))
    rendered = []
    beginnings.render = lambda *args: rendered.append(args)  # type: ignore[method-assign]
    for count in range(1, len(CHAT)):
        assert beginnings.until(count, True) is not None
    assert not rendered


@pytest.mark.parametrize("name", [*PLAIN, *LOOKING, *sorted(all_templates())])
def test_tails_are_proven_before_the_first_row(name: str) -> None:
    """The tails do not depend on the chat that is rendered first."""
    text = {**PLAIN, **LOOKING, **all_templates()}[name]
    fresh, used = open_template(text), open_template(text)
    for shape in SHAPES.values():
        try:
            beginnings = used.render_beginnings(messages_of(shape["messages"]), shape.get("tools", []))
            beginnings.until(1, True)
        except TemplateRefused:
            continue
    assert used.tails == fresh.tails
    assert_alike(fresh, [u("other?"), *CHAT[1:], u("and?"), a("yes")], [])


@pytest.mark.parametrize("name", sorted(all_templates()))
def test_beginnings_in_templates_of_others(name: str) -> None:
    template = trusting(all_templates()[name], SHAPES["many turns"]["messages"])
    for shape in SHAPES.values():
        assert_alike(template, shape["messages"], shape.get("tools", []))
