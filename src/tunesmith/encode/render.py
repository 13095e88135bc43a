"""Render a chat as the texts to train on, and find each reply in them.

A reply begins after its prompt: the turns before it, rendered with the generation prompt, exactly as the model will get
them. It ends with the stop token after the last part of the turn. The parts of a turn are known from a trace
(trace.py), so nothing is found by searching for its words.

One rendering of the finished chat serves all replies if it contains each of them after its exact prompt and unchanged
(`as_rendered`). Where the template writes earlier turns differently once others follow, each reply gets its own
rendering (`unrolled`). Where the finished turn does not begin with its generation prompt, prompt and reply are joined
(`composed`, compose.py).
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.chat_template.beginnings import Beginnings
from tunesmith.chat_template.habits import TemplateRefused, shared_length
from tunesmith.chat_template.scalars import find_lost_scalars
from tunesmith.chat_template.schemas import writes_all_parameters
from tunesmith.chat_template.template import ChatTemplate, Renderer
from tunesmith.chat_template.trace import Part, Place, Trace
from tunesmith.encode.compose import compose_reply
from tunesmith.encode.stops import Stops
from tunesmith.encode.thoughts import find_context
from tunesmith.rows.conversation import Conversation, Message, RowRefused

_NEVER = sys.maxsize
_CHOOSE = "Choose another template with --data.chat_template"
_STOPS_INSIDE = f"the template writes a stop token inside it, where generation would end. {_CHOOSE}"

NOTE_GREETING = "begins with a reply to no question; it is context"
NOTE_NAME = "the name of a turn is not written by the template"
NOTE_SCHEMA = "the description of a tool is not written by the template"
NOTE_PARAMETERS = "parts of the parameters of a tool are not written by the template"
NOTE_DOCUMENTS = "a part of a document is not written by the template"
NOTE_WORDS = "the template leaves out words of an earlier reply once others follow"


@dataclass(frozen=True, slots=True)
class Span:
    """A reply in a rendered text.

    Attributes:
        prompt: all text before it, as the model will get it.
        start: the first trained character; after the prompt only where the template's {% generation %} mark begins
            later.
        end: the character after its stop token.
        stop: the text of that token.
        turn: index of its message, for error messages.
        context: characters [start, end) between `start` and `end` that are not trained.
    """

    prompt: str
    start: int
    end: int
    stop: str
    turn: int
    context: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to train on, and its replies.

    Attributes:
        places: of the row's parts, sorted; no control token may be inside them.
    """

    text: str
    spans: tuple[Span, ...]
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A row's texts and how they were made: as_rendered (one for all turns), unrolled or composed (one per turn)."""

    how: str
    parts: tuple[Rendered, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Chat:
    """A conversation and everything that its rendering depends on."""

    conversation: Conversation
    renderer: Renderer
    stops: Stops
    train_reasoning: bool
    variables: dict[str, Any]
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages

    def begin(self, count: int) -> Beginnings:
        return self.renderer.render_beginnings(self.messages[:count], self.conversation.tools, self.variables)


def render_chat(
    conversation: Conversation,
    renderer: Renderer,
    stops: Stops,
    history: str = "auto",
    train_reasoning: bool = True,
) -> RenderedChat:
    """The texts to train on for a chat.

    Args:
        history: data.history.
        train_reasoning: data.train_reasoning.

    Raises:
        RowRefused: the template rejects the turns, or drops part of them.
    """
    chat = _Chat(conversation, renderer, stops, train_reasoning, variables_of(conversation, renderer.template))
    try:
        trained = _find_trained(chat)
        done = _render_all(chat, trained, history)
        if conversation.tools and not _writes_parameters(chat, trained[0]):
            chat.notes[NOTE_PARAMETERS] = None
    except TemplateRefused as refusal:
        raise RowRefused(f"the chat template rejects it: {refusal}", code="template-rejects") from None
    return replace(done, notes=tuple(chat.notes))


def _writes_parameters(chat: _Chat, turn: int) -> bool:
    turns = chat.renderer.to_turns(chat.messages[:turn])
    tools = chat.conversation.tools
    return writes_all_parameters(tools, lambda tools: chat.renderer.render_turns(turns, tools, True, chat.variables))


def variables_of(conversation: Conversation, template: ChatTemplate) -> dict[str, Any]:
    """The row's own variables for the template.

    Raises:
        RowRefused: the template does not read a variable, so that its contents would be lost.
    """
    variables = dict(conversation.template_kwargs)
    if conversation.documents:
        variables["documents"] = list(conversation.documents)
    for name in variables:
        if name in ("messages", "tools", "add_generation_prompt"):
            raise RowRefused(
                f"chat_template_kwargs sets {name}, which tunesmith sets itself. Remove it from the row",
                code="variable-reserved",
            )
        if name not in template.reads:
            column = "documents" if name == "documents" else "chat_template_kwargs"
            what = column if name == column else f"{name} of {column}"
            raise RowRefused(
                f"the template does not read {what}. {_CHOOSE}, or leave the column out: --data.ignore_columns "
                f"{column}",
                code="variable-not-read",
            )
    return variables


def _find_trained(chat: _Chat) -> list[int]:
    """Turns to train. A greeting that opens a chat is context if the template cannot render a prompt for it."""
    trained = [turn for turn, m in enumerate(chat.messages) if m.role == "assistant" and m.is_trained]
    first = trained[0]
    if any(message.role != "system" for message in chat.messages[:first]):
        return trained
    try:
        chat.renderer.render(chat.messages[:first], chat.conversation.tools, True, chat.variables)
        return trained
    except TemplateRefused as refusal:
        if len(trained) == 1:
            reason = (
                f"turn {first} (assistant): no turn precedes it, and the template renders no prompt for a first reply"
            )
            raise RowRefused(f"{reason} ({refusal})", code="reply-unasked") from None
        chat.notes[NOTE_GREETING] = None
        return trained[1:]


def _render_all(chat: _Chat, trained: list[int], history: str) -> RenderedChat:
    if history == "auto":
        try:
            return RenderedChat("as_rendered", (_render_whole(chat, trained),))
        except RowRefused as refusal:
            return _unroll(chat, trained, refusal)
    return _unroll(chat, trained if history == "unroll" else trained[-1:])


def _render_whole(chat: _Chat, trained: list[int]) -> Rendered:
    beginnings = chat.begin(len(chat.messages))
    trace = beginnings.trace(chat.renderer.habits.removed)
    spans = tuple(_find_span(chat, turn, beginnings, trace) for turn in trained)
    _refuse_lost_context(chat, trace, [(span.turn, len(span.prompt)) for span in spans])
    return Rendered(beginnings.text, spans, tuple(trace.places))


def _unroll(chat: _Chat, trained: list[int], first: RowRefused | None = None) -> RenderedChat:
    """One text per turn. `first`: why one rendering of all turns fails; raised where it explains more."""
    how, parts = "unrolled", []
    for turn in trained:
        beginnings = chat.begin(turn + 1)
        prompt = beginnings.until(turn, add_generation_prompt=True)
        trace = beginnings.trace(chat.renderer.habits.removed)
        try:
            span = _find_span(chat, turn, beginnings, trace)
            _refuse_lost_context(chat, trace, [(turn, len(prompt))])
            parts.append(Rendered(beginnings.text, (span,), tuple(trace.places)))
        except RowRefused as refusal:
            how = "composed"
            parts.append(_compose(chat, turn, beginnings, prompt, trace, first or refusal))
    if how == "unrolled" and len(chat.messages) - 1 == trained[0]:
        how = "as_rendered"  # for a single reply at the end, this is the finished conversation
    return RenderedChat(how, tuple(parts))


def _compose(
    chat: _Chat, turn: int, beginnings: Beginnings, prompt: str, trace: Trace, refusal: RowRefused
) -> Rendered:
    """Concatenate prompt, reply and stop token.

    Raises:
        RowRefused: `refusal`, where no rule fits.
    """
    stop = chat.stops.of(chat.messages[turn])
    _refuse_unaskable(chat, turn, prompt, beginnings)
    before = beginnings.trace(chat.renderer.habits.removed, turn, add_generation_prompt=True)
    _refuse_lost_context(chat, before, [(turn, len(prompt))])
    reply = compose_reply(chat.renderer.habits, chat.messages[turn], turn, prompt, before, beginnings, trace, stop)
    if reply is None:
        raise refusal
    if chat.stops.stand_in(reply.body):
        raise RowRefused(f"turn {turn} (assistant): {_STOPS_INSIDE}", code="stop-token-inside")
    text = prompt + reply.body + stop
    places = [replace(place, start=place.start + len(prompt), end=place.end + len(prompt)) for place in reply.places]
    _refuse_lost_reply(turn, chat, places, trace, len(prompt), len(text) - len(stop), beginnings)
    context = find_context(
        chat.messages[turn], places, text, len(prompt), chat.renderer.habits, chat.train_reasoning, turn
    )
    span = _shift_start(Span(prompt, len(prompt), len(text), stop, turn, context), text)
    return Rendered(text, (span,), (*before.places, *places))


def _find_span(chat: _Chat, turn: int, beginnings: Beginnings, trace: Trace) -> Span:
    """The span of a turn's reply in the rendering of `beginnings`."""
    text, prompt = beginnings.text, beginnings.until(turn, add_generation_prompt=True)
    message, stop = chat.messages[turn], chat.stops.of(chat.messages[turn])
    _refuse_unaskable(chat, turn, prompt, beginnings)
    if not text.startswith(prompt):
        raise RowRefused(
            f"turn {turn} (assistant): the template begins the turn in the finished conversation differently than with "
            f"its generation prompt. {_CHOOSE}",
            code="generation-prompt-differs",
        )
    own = [place for place in trace.of_turn(turn) if place.start >= len(prompt)]
    if not own:
        _refuse_lost_reply(turn, chat, own, trace, len(prompt), len(text), beginnings)
    # The turn ends where its rendering and that of all turns diverge; some templates write more at the very end.
    shared = shared_length(beginnings.until(turn + 1), text)
    stop_at = text.find(stop, own[-1].end, shared) if own else -1
    others = [place.part.turn for place in trace.places if len(prompt) <= place.start < stop_at]
    if stop_at >= 0 and chat.stops.stand_in(text[len(prompt) : stop_at]):
        raise RowRefused(f"turn {turn} (assistant): {_STOPS_INSIDE}", code="stop-token-inside")
    if any(other < turn for other in others):
        raise RowRefused(
            f"turn {turn} (assistant): the template writes other turns into it. {_CHOOSE}", code="others-in-reply"
        )
    if stop_at < 0 or any(other > turn for other in others):
        raise RowRefused(
            f"turn {turn} (assistant): the template writes it differently once other turns follow",
            code="reply-rewritten-later",
        )
    start, end = _marked(beginnings.marks, len(prompt), stop_at)
    if text[end:stop_at].strip() or (start > len(prompt) and any(place.start < start for place in own)):
        raise RowRefused(
            f"turn {turn} (assistant): the template's {{% generation %}} mark leaves out part of it. {_CHOOSE}",
            code="generation-mark-too-short",
        )
    _refuse_lost_reply(turn, chat, own, trace, start, stop_at, beginnings)
    context = find_context(message, own, text, len(prompt), chat.renderer.habits, chat.train_reasoning, turn)
    return _shift_start(Span(prompt, start, stop_at + len(stop), stop, turn, context), text)


def _shift_start(span: Span, text: str) -> Span:
    """Count a prefill as part of the prompt, since the model will get it that way."""
    if span.context and span.context[0][0] == span.start == len(span.prompt):
        (_, said_from), *rest = span.context
        return replace(span, prompt=text[:said_from], start=said_from, context=tuple(rest))
    return span


def _refuse_unaskable(chat: _Chat, turn: int, prompt: str, beginnings: Beginnings) -> None:
    """Refuse a reply directly after another where the generation prompt is empty: no model is prompted there."""
    if turn and chat.messages[turn - 1].role == "assistant" and prompt == beginnings.until(turn):
        raise RowRefused(
            f"turn {turn} (assistant): the template renders no prompt for a second reply in a row. Join the two",
            code="second-reply-unasked",
        )


def _marked(marks: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The part of characters [start, end) inside the template's {% generation %} marks; all of it without marks."""
    inside = [(max(start, a), min(end, b)) for a, b in marks if a < end and b > start]
    if not inside:
        return (start, start) if marks else (start, end)
    return inside[0][0], inside[-1][1]


def _refuse_lost_reply(
    turn: int, chat: _Chat, own: Sequence[Place], trace: Trace, start: int, end: int, beginnings: Beginnings
) -> None:
    """Refuse a row where a part of the assistant's turn is missing or changed in the rendered reply."""
    written = {place.part for place in own if start <= place.start and place.end <= end}
    for part in trace.parts:
        if part.turn != turn or part in written:
            continue
        if part.kind == "name":
            chat.notes[NOTE_NAME] = None
        else:
            how = "rewrites" if part in trace.rewritten else "drops"
            raise RowRefused(f"turn {turn} (assistant): the template {how} {part.label}. {_CHOOSE}", code="reply-lost")
    if not chat.messages[turn].tool_calls:
        return
    lost = find_lost_scalars(
        beginnings.text, beginnings.turns, turn, lambda turns: beginnings.render(turns, beginnings.tools)
    )
    if lost is not None:
        raise RowRefused(
            f"turn {turn} (assistant): the template drops {lost} of its tool call. {_CHOOSE}", code="call-lost"
        )


def _refuse_lost_context(chat: _Chat, trace: Trace, asked: Sequence[tuple[int, int]]) -> None:
    """Refuse a row with parts before a reply that are missing before it in the text.

    Reasoning of earlier replies is excepted: most templates drop it, and the model never sees it again.

    Args:
        asked: (turn, characters of its prompt) of every reply trained on this rendering, in order.
    """
    ends: dict[Part, int] = {}
    for place in trace.places:
        ends.setdefault(place.part, place.end)
    turns = [turn for turn, _ in asked]
    for part in trace.parts:
        following = bisect.bisect_right(turns, part.turn)
        if following == len(turns) or part.kind == "reasoning" or ends.get(part, _NEVER) <= asked[following][1]:
            continue
        if part.kind == "name":
            chat.notes[NOTE_NAME] = None
        elif part.kind == "tool_description":
            chat.notes[NOTE_SCHEMA] = None
        elif part.kind == "document_key":
            chat.notes[NOTE_DOCUMENTS] = None
        elif part.turn >= 0 and chat.messages[part.turn].role == "assistant":
            chat.notes[NOTE_WORDS] = None
        else:
            where = f"turn {part.turn} ({chat.messages[part.turn].role}): " if part.turn >= 0 else ""
            how = "rewrites" if part in trace.rewritten else "drops"
            raise RowRefused(f"{where}the template {how} {part.label}. {_CHOOSE}", code="context-lost")
