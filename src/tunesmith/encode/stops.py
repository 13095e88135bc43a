"""Find the tokens that end a reply as a template writes them, for words and for tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.chat_template.habits import PROBE_TOOL, PROBE_WORDS, TemplateRefused, probe_call
from tunesmith.chat_template.template import Renderer
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message

if TYPE_CHECKING:
    from tunesmith.encode.encoder import Encoder

_PROBE, _ASKED = "tunesmith-probe-reply", "tunesmith-probe-question"


@dataclass(frozen=True, slots=True)
class StopToken:
    """The token that ends an assistant turn: trained at the end of every reply; generation stops at it."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Stops:
    """Texts of the stop tokens: after words, and after a tool call where the template ends those differently."""

    words: str
    call: str

    def of(self, message: Message) -> str:
        return self.call if message.tool_calls else self.words

    def stand_in(self, text: str) -> bool:
        """Whether generation would stop inside a text."""
        return self.words in text or self.call in text


def find_stops(encoder: Encoder, renderer: Renderer | None) -> tuple[StopToken, StopToken]:
    """The stop token after words, and the one after a tool call.

    Raises:
        ModelError: the tokenizer lacks a required EOS, or the template ends replies without a token that generation
            could stop at.
    """
    if renderer is None:
        eos = _eos_of(encoder)
        return eos, eos
    words = StopToken(found := _find_stop(encoder, renderer), encoder.added_text(found))
    call = _find_call_stop(encoder, renderer, words.id)
    return words, StopToken(call, encoder.added_text(call))


def _eos_of(encoder: Encoder) -> StopToken:
    if encoder.eos_id is None:
        raise ModelError(
            "data.chat_template none ends each completion with EOS, but the tokenizer has no eos_token. Use a chat "
            "template, or a tokenizer with one.",
            code="no-eos-token",
        )
    return StopToken(encoder.eos_id, encoder.tokenizer.eos_token)


def _find_stop(encoder: Encoder, renderer: Renderer) -> int:
    """The last added token after a reply that is also there when a user turn follows; EOS if there is none.

    Some templates write more at the end of a chat (EOS after <|im_end|>), some less (Apertus closes a turn when the
    next one begins).
    """
    tail = _tail_of_reply(renderer)
    between, head = _between_turns(encoder, renderer)
    found = encoder.find_added(tail)
    if found:
        both = [token for token in found if token in between]
        return (both or found)[-1]
    while between and head and between[-1] == head[-1]:  # the beginning of the next turn
        between, head = between[:-1], head[:-1]
    if between:
        return between[-1]
    ends_in_nothing = not tail.strip() and _asks(renderer)  # GLM; its samples get EOS there
    if ends_in_nothing and encoder.eos_id is not None and encoder.eos_id in encoder.added_ids:
        return encoder.eos_id
    raise ModelError(
        f"the chat template ({renderer.template.source}) ends a reply with {tail!r}, which contains no special token "
        "of this tokenizer, so generation could never stop there. Use a template that ends replies with eos_token "
        "(--data.chat_template alpaca does).",
        code="no-stop-token",
    )


def _asks(renderer: Renderer) -> bool:
    """Whether the template writes a generation prompt, so that a model can be prompted at all."""
    question = [Message("user", "Hi")]
    try:
        return renderer.render(question) != renderer.render(question, add_generation_prompt=True)
    except TemplateRefused:
        return False


def _tail_of_reply(renderer: Renderer) -> str:
    said = [Message("user", "Hi"), Message("assistant", _PROBE)]
    try:
        try:
            text = renderer.render(said)
        except TemplateRefused:  # some templates only render chats with tools
            text = renderer.render(said, [PROBE_TOOL])
    except TemplateRefused as refusal:
        raise ModelError(
            f"the chat template ({renderer.template.source}) cannot render a question and its answer: {refusal}. "
            "Choose another one with --data.chat_template.",
            code="template-rejects",
        ) from None
    _, found, tail = text.rpartition(_PROBE)
    if not found:
        raise ModelError(
            f"the chat template ({renderer.template.source}) does not write the text of a reply. Choose another one "
            "with --data.chat_template.",
            code="template-drops-replies",
        )
    return tail


def _between_turns(encoder: Encoder, renderer: Renderer) -> tuple[list[int], list[int]]:
    """Added tokens between a reply and the next user turn, and those before the first user turn."""
    said = [Message("user", _ASKED), Message("assistant", _PROBE), Message("user", _ASKED)]
    try:
        text = renderer.render(said)
    except TemplateRefused:
        return [], []
    head, _, behind = text.partition(_ASKED)
    between = behind.partition(_PROBE)[2].partition(_ASKED)[0]
    return encoder.find_added(between), encoder.find_added(head)


def _find_call_stop(encoder: Encoder, renderer: Renderer, stop: int) -> int:
    """The token that ends a tool call, where it differs from the one that ends words (gpt-oss writes <|call|>)."""
    if not renderer.habits.writes_calls:
        return stop
    try:
        text = renderer.render(probe_call(), [PROBE_TOOL])
    except TemplateRefused:
        return stop
    found = encoder.find_added(text[max(text.rfind(word) for word in PROBE_WORDS) :])
    if not found or stop in found or encoder.added_text(found[-1]).startswith("</"):
        return stop
    return found[-1]
