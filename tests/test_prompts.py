"""Prompts are rendered by the same code as rows, with the date and variables of their own request."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest

from tunesmith.encode.messages import NOTE_CONTROL, prepare_messages
from tunesmith.errors import ModelError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import Conversation, Message, RowRefused

DATE = datetime.datetime(2026, 1, 2)
DATED = (
    "{{ strftime_now('%Y-%m-%d') }} "
    "{{ mood|default('none') }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WANTS_IDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ c.id + c.function|tojson }}{% if c.id|length != 9 %}{{ raise_exception('nine letters') }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = [Message("user", "Hi")]


def open_encoder(tokenizer: Any, text: str | None, control_text: str = "plain", **variables: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = text
    return build_encoder(own, None if text else "none", variables, DATE, control_text)


def prompt(encoder: Any, **request: Any) -> str:
    return encoder.tokenizer.decode(encoder.encode_prompt(ASKED, **request))


def test_date_and_variables_are_those_of_the_request(tokenizer: Any) -> None:
    encoder = open_encoder(tokenizer, DATED, mood="calm")
    assert prompt(encoder).startswith("2026-01-02 calm<|im_start|>user")
    other = datetime.datetime(2031, 5, 17)
    assert prompt(encoder, date=other).startswith("2031-05-17 calm<")
    assert prompt(encoder, variables={"mood": "wild"}).startswith("2026-01-02 wild<")
    assert prompt(encoder).startswith("2026-01-02 calm<")


def test_prompts_get_the_call_ids_that_rows_get(tokenizer: Any) -> None:
    encoder = open_encoder(tokenizer, WANTS_IDS)
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    messages = [*ASKED, Message("assistant", "", tool_calls=(call,)), Message("tool", "wet")]
    row = Conversation((*messages, Message("assistant", "It rains.")))
    habits = encoder.renderer().habits
    rendered = encoder.renderer().render(prepare_messages(row, habits, encoder.shield).messages)
    assert rendered.startswith(encoder.tokenizer.decode(encoder.encode_prompt(messages)))


def test_a_row_and_a_prompt_are_prepared_alike(tokenizer: Any) -> None:
    encoder = open_encoder(tokenizer, DATED)
    chat = Conversation((Message("user", "Say <|im_end|>"),))
    prepared = prepare_messages(chat, encoder.renderer().habits, encoder.shield)
    assert prepared.notes == (NOTE_CONTROL,)
    assert prepared.messages == prepare_messages(chat.messages, None, encoder.shield).messages
    assert prepared.messages != chat.messages
    with pytest.raises(RowRefused) as refused:
        prepare_messages(chat, None, encoder.shield, "refuse")
    assert refused.value.code == "control-text"
    with pytest.raises(ModelError) as error:
        open_encoder(tokenizer, DATED, "refuse").encode_prompt(chat.messages)
    assert error.value.code == "conversation-refused"


def test_without_a_template_a_prompt_is_the_text_itself(tokenizer: Any) -> None:
    assert prompt(open_encoder(tokenizer, None)) == "Hi"
