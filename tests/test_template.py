"""Templates render as transformers renders them, but with the run's date."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from conftest import SHARED
from test_matrix import OWN_TEMPLATES
from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import ChatTemplate, Renderer, RenderSettings, load_built_in
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
CHAT = [
    Message("user", "Hi <b>&"),
    Message("assistant", "Hello\n"),
    Message("user", "你好"),
    Message("assistant", "嗨"),
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "ünit": "°C"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CASES: dict[str, tuple[list[Message], list[dict[str, Any]], bool]] = {
    "chat": (CHAT, [], False),
    "prompt": (CHAT[:3], [], True),
    "system": ([Message("system", "Be brief."), *CHAT], [], False),
    "reasoning": ([CHAT[0], Message("assistant", "A", reasoning_content="hm")], [], False),
    "tools": ([CHAT[0], Message("assistant", "", tool_calls=(CALL,)), Message("tool", "12"), CHAT[1]], [TOOL], False),
}  # fmt: skip
PATHS = [*sorted(OWN_TEMPLATES.rglob("*.jinja")), *sorted((SHARED / "templates").glob("*/*.jinja"))]
DATE = datetime.datetime(2031, 5, 17, 10, 30)


def template(text: str, **kwargs: Any) -> Renderer:
    return ChatTemplate(text, "test", SPECIAL).with_settings(RenderSettings(DATE, kwargs))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_renders_as_transformers_does(path: Any, case: str) -> None:
    text = path.read_text(encoding="utf-8")
    messages, tools, is_prompt = CASES[case]
    form = template(text).habits.call_form  # DeepSeek-V3's template concatenates arguments, so they must be text
    try:
        theirs = render_jinja_template(
            conversations=[[form.apply(m.to_template()) for m in messages]], tools=tools or None, chat_template=text,
            add_generation_prompt=is_prompt, **SPECIAL,
        )[0][0]  # fmt: skip
    except Exception:
        with pytest.raises(TemplateRefused):
            template(text).render(messages, tools, is_prompt)
        return
    today = datetime.datetime.now()
    ours = ChatTemplate(text, "test", SPECIAL).with_settings(RenderSettings(today)).render(messages, tools, is_prompt)
    assert ours == theirs


def test_the_date_is_the_runs_date() -> None:
    assert template("{{ strftime_now('%d %b %Y') }}").render([]) == "17 May 2031"


def test_template_kwargs_reach_the_template() -> None:
    assert template("{{ 'on' if enable_thinking else 'off' }}", enable_thinking=True).render([]) == "on"


def test_generation_tags_render_as_their_body() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert template(text).render([Message("assistant", "A")]) == "A"


def test_a_stranger_s_template_cannot_reach_python() -> None:
    with pytest.raises(TemplateRefused):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([])
    with pytest.raises(TemplateRefused):
        template("{{ messages.append(1) }}").render([])


@pytest.mark.parametrize(
    "text",
    [
        "{{ 1 // (messages|length) }}",
        "{{ 2.0 ** 99999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9)|list }}",
        "{{ missing.key }}",
        "{% include 'other' %}",
    ],
)
def test_whatever_goes_wrong_inside_a_template_is_a_refusal(text: str) -> None:
    with pytest.raises(TemplateRefused):
        template(text).render([])


def test_a_name_reaches_the_template() -> None:
    text = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }};{% endfor %}"
    assert (
        template(text).render([Message("user", "Q", name="ann"), Message("assistant", "A")]) == "ann: Q;assistant: A;"
    )


def test_a_broken_template_names_its_line() -> None:
    with pytest.raises(ModelError) as error:
        template("{% for m in messages %}\n{{ m. }}{% endfor %}").render([])
    assert error.value.code == "template-syntax"
    assert "line 2" in str(error.value)


def test_alpaca_is_the_instruction_response_form() -> None:
    text = template(load_built_in("alpaca", add_bos=True)).render([Message("system", "S"), *CHAT])
    assert text == (
        "<s>S\n\n### Instruction:\nHi <b>&\n\n### Response:\nHello\n</s>\n\n"
        "### Instruction:\n你好\n\n### Response:\n嗨</s>"
    )
    prompt = template(load_built_in("alpaca", add_bos=False)).render(CHAT[:3], add_generation_prompt=True)
    assert prompt.endswith("### Instruction:\n你好\n\n### Response:\n")


def test_chatml() -> None:
    text = template(load_built_in("chatml", add_bos=False)).render(CHAT[:1], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi <b>&<|im_end|>\n<|im_start|>assistant\n"
