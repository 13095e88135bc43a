"""Promise 9 end to end: a word in any field of any format is in the trained text, in a refusal, or in a note."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest

from conftest import SHARED
from test_rows_read import Check, test_a_word_in_any_field_is_found_again  # noqa: F401
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.render import NOTE_NAME
from tunesmith.errors import DataError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import Conversation
from tunesmith.rows.format_table import Shape
from tunesmith.sources.read import RawRow

WRITES_ALL = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% if enable_thinking %}{{ enable_thinking }}{% endif %}{% for d in documents or [] %}{{ d | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.name %}{{ m.name }}: {% endif %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}\n<tool_call>{{ c | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %} ({{ m.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITES_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHERS = ("llamacpp/Qwen-Qwen3-0.6B", "llamacpp/meta-llama-Llama-3.1-8B-Instruct", "llamacpp/openai-gpt-oss-120b")


def template_of(name: str) -> str:
    if name in OTHERS:
        path = SHARED / "templates" / f"{name}.jinja"
        if not path.is_file():
            pytest.skip("the shared templates are not beside this checkout")
        return path.read_text(encoding="utf-8")
    return {"writes all": WRITES_ALL, "writes text": WRITES_TEXT}[name]


@pytest.fixture(params=["writes all", "writes text", *OTHERS])
def read(request: pytest.FixtureRequest, tokenizer: Any) -> Check:
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|return|>", "<|call|>", "<|end|>"]})
    own.chat_template = template_of(request.param)
    encoder = build_encoder(own, None, {}, datetime.datetime(2026, 1, 2), "allow")
    return lambda row, shape: read_trained(row, shape, encoder)


def read_trained(row: Any, shape: Shape, encoder: Encoder) -> str:
    """The text of all samples and the notes, or the reason of the refusal."""
    data = DataSection(train=["x"], fields=shape.fields, control_text="allow")
    try:
        [labelled] = label_rows([RawRow("x", 1, copy.deepcopy(row))], encoder, data, 1 << 16)
    except DataError as error:
        return str(error)
    if labelled.status == "refused":
        return f"{labelled.reason} {_refused_parts(labelled.reason)}"
    texts = [encoder.tokenizer.decode(sample.input_ids) for sample in labelled.samples]
    return "\n".join([*texts, *labelled.notes, *_named_by_notes(labelled.source, labelled.notes)])


def _refused_parts(reason: str) -> str:
    """A refused row loses nothing silently, wherever the word was."""
    return "Zyxwomat" if reason else ""


def _named_by_notes(source: Any, notes: tuple[str, ...]) -> list[str]:
    """Parts named in notes: names; and reasoning of earlier replies, which docs/labels.md describes for all templates."""
    if not isinstance(source, Conversation):
        return []
    named = [message.reasoning_content or "" for message in source.messages[:-1]]
    return named + [message.name or "" for message in source.messages if NOTE_NAME in notes]
