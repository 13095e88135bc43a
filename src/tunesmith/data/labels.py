"""Which tokens are trained: the assistant's reply and its stop token, nothing more and nothing less.

Where a reply begins is known from rendering the turns before it with the generation prompt, which is what the model
will be given when it is asked; where it ends, from the stop token behind it. One rendering of the whole chat serves all
its replies where that prompt is a prefix of it; else each reply gets its own. If the ids before a reply are not the ids
of its prompt, the row is refused: its labels would teach something that never happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tunesmith.data.conversation import Conversation, Message, RowRefused
from tunesmith.data.encode import Encoder, Encoding, StopToken
from tunesmith.data.template import Beginnings, ChatTemplate, TemplateRefused

_THINK, _END_THINK = "<think>", "</think>"

REFUSED_INEXACT = "spells a control token in a place where this tokenizer cannot be shown to keep it as plain text"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Token ids and which of them are trained (1) or context (0), equally long."""

    input_ids: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]

    @property
    def num_targets(self) -> int:
        """Trained tokens that have a token before them to be predicted from."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, slots=True)
class Span:
    """A reply in a rendered text.

    Attributes:
        prompt: everything before it, as the model will be given it.
        start: the character from which it is trained; behind the prompt only where the template's {% generation %}
            mark begins there.
        end: the character behind its stop token.
        turn: index of its message, for messages to people.
    """

    prompt: str
    start: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to train on, and its replies."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A row's texts and how they came about: as_rendered (one for all turns), unrolled or composed (one a turn)."""

    how: str
    parts: tuple[Rendered, ...]


def render_chat(conversation: Conversation, template: ChatTemplate, stop: str, history: str = "auto") -> RenderedChat:
    """The chat as it is trained.

    Where the finished conversation holds every reply behind the very prompt that the model will be given, one rendering
    serves all of them; where the template writes earlier turns differently once others follow (most reasoning models
    drop their thoughts), each turn is rendered as it stands when it is answered.

    Args:
        history: data.history.

    Raises:
        RowRefused: the template rejects the turns, or drops part of one.
    """
    trained = [turn for turn, m in enumerate(conversation.messages) if m.role == "assistant" and m.is_trained]
    try:
        if history == "auto":
            try:
                return RenderedChat("as_rendered", (_render_whole(conversation, trained, template, stop),))
            except RowRefused as refusal:
                return _unroll(conversation, trained, template, stop, refusal)
        return _unroll(conversation, trained if history == "unroll" else trained[-1:], template, stop)
    except TemplateRefused as refusal:
        raise RowRefused(f"the chat template rejects it: {refusal}") from None


def _render_whole(conversation: Conversation, trained: list[int], template: ChatTemplate, stop: str) -> Rendered:
    beginnings = template.render_beginnings(conversation.messages, conversation.tools)
    _refuse_lost_context(conversation, beginnings.text)
    return Rendered(
        beginnings.text, tuple(_find_span(conversation.messages, turn, beginnings, stop) for turn in trained)
    )


def _unroll(
    conversation: Conversation, trained: list[int], template: ChatTemplate, stop: str, first: RowRefused | None = None
) -> RenderedChat:
    """One text a turn. `first`: why one rendering of all turns would not do; the better reason where this fails too."""
    how, parts = "unrolled", []
    for turn in trained:
        until = replace(conversation, messages=conversation.messages[: turn + 1])
        beginnings = template.render_beginnings(until.messages, until.tools)
        prompt = beginnings.until(turn, add_generation_prompt=True)
        _refuse_lost_context(until, prompt)
        try:
            parts.append(Rendered(beginnings.text, (_find_span(until.messages, turn, beginnings, stop),)))
        except RowRefused as refusal:
            mark = beginnings.marks[-1] if beginnings.marks else None
            body = compose_reply(prompt, beginnings.text, until.messages[turn], stop, mark)
            if body is None:
                raise (first or refusal) from None
            _refuse_lost_reply(turn, until.messages[turn], body)
            how, text = "composed", prompt + body + stop
            parts.append(Rendered(text, (Span(prompt, len(prompt), len(text), turn),)))
    if how == "unrolled" and len(conversation.messages) - 1 == trained[0]:
        how = "as_rendered"  # a single reply at the end is the finished conversation itself
    return RenderedChat(how, tuple(parts))


def compose_reply(
    prompt: str, text: str, message: Message, stop: str, mark: tuple[int, int] | None = None
) -> str | None:
    """A reply for a template whose finished turns do not begin with its own generation prompt; None if no rule fits.

    Rules. Where the prompt has opened the thinking (QwQ, R1 and its distills), the model goes on with its thoughts and
    closes them itself: reasoning, "</think>", content, tool calls as the template spells them. Elsewhere (DeepSeek-V3,
    Mistral with a system prompt: they differ in what precedes the reply), the reply is what the template marks as
    {% generation %}, or writes from the first word said on. A template that ends replies in nothing (GLM) gets EOS
    behind them.

    Args:
        prompt: ends with the generation prompt.
        text: the template's own rendering up to this turn's end.
        mark: where its last {% generation %} block stands in it, if it has any; that is what was said, then.
    """
    content = message.content.strip()
    if (opened := prompt.rstrip()).endswith(_THINK):
        said: str | None = content
        if message.tool_calls:
            said = _said_behind(opened.removesuffix(_THINK), text, stop)
        reasoning = (message.reasoning_content or "").strip()
        return f"{reasoning}\n{_END_THINK}\n\n{said}" if said is not None else None
    if prompt.rstrip().endswith(_END_THINK) and message.reasoning_content:
        raise RowRefused(
            "the template's generation prompt has closed the thinking before the reply, so its reasoning_content could "
            "never be said; open it with the template's own variable (--data.template_kwargs.enable_thinking true, "
            "open_thinking true)"
        )
    end = text.rfind(stop, _shared_length(prompt, text))
    if end < 0:  # the template itself ends a reply in nothing
        end = len(text.rstrip())
    if mark:
        return text[mark[0] : min(mark[1], end)]
    if text.startswith(prompt):
        return text[len(prompt) : end]
    if message.tool_calls:
        before, opened_again, _ = prompt.rpartition(
            _THINK
        )  # a prompt that has closed an empty thinking (QwQ with tools)
        said = _said_behind(before, text, stop) if opened_again and prompt.rstrip().endswith(_END_THINK) else None
        return said if said is None or prompt.endswith("\n") else f"\n\n{said}"
    first = (message.reasoning_content or "").strip() or content
    start = text.rfind(first, 0, end) if first else -1
    return text[start:end] if start >= 0 else None


def _said_behind(prompt: str, text: str, stop: str) -> str | None:
    """What the template itself writes behind a prompt, without thoughts of its own."""
    end = text.rfind(stop)
    if not text.startswith(prompt) or end < len(prompt):
        return None
    return text[len(prompt) : end].rpartition(_END_THINK)[2].strip()


def _find_span(messages: Sequence[Message], turn: int, beginnings: Beginnings, stop: str) -> Span:
    text, prompt = beginnings.text, beginnings.until(turn, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise RowRefused(
            f"turn {turn} (assistant): the template's generation prompt is not how it begins the turn in the finished "
            "conversation"
        )
    # The turn ends where rendering up to it and rendering everything part; some templates write more at the very end.
    shared = _shared_length(beginnings.until(turn + 1), text)
    stop_at = text.rfind(stop, len(prompt), shared)
    if stop_at < 0:
        raise RowRefused(f"turn {turn} (assistant): the template writes it differently once other turns follow")
    start, end = _marked(beginnings.marks, len(prompt), stop_at)
    if text[end:stop_at].strip():
        raise RowRefused(f"turn {turn} (assistant): the template's {{% generation %}} mark leaves out part of it")
    _refuse_lost_reply(turn, messages[turn], text[start:end])
    return Span(prompt, start, stop_at + len(stop), turn)


def _marked(marks: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """What the template's {% generation %} marks leave of the characters [start, end); all of it without marks."""
    inside = [(max(start, a), min(end, b)) for a, b in marks if a < end and b > start]
    if not inside:
        return (start, start) if marks else (start, end)
    return inside[0][0], inside[-1][1]


def _shared_length(one: str, other: str) -> int:
    """Characters that two texts have in common from the start; by halves, since most often one begins the other."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def _refuse_lost_reply(turn: int, message: Message, body: str) -> None:
    """Everything that the row says the assistant said must stand in the rendered reply."""
    parts = {"content": message.content, "reasoning_content": message.reasoning_content or ""}
    for name, said in parts.items():
        if said.strip() not in body:
            raise RowRefused(f"turn {turn} (assistant): the template drops or rewrites its {name}")
    for call in message.tool_calls:
        function = call["function"]
        arguments = function["arguments"]
        words = [function["name"], *(arguments if isinstance(arguments, dict) else [])]
        if not all(str(word) in body for word in words):
            raise RowRefused(f"turn {turn} (assistant): the template drops its tool call {function['name']}")


def _refuse_lost_context(conversation: Conversation, text: str) -> None:
    for turn, message in enumerate(conversation.messages):
        if message.role != "assistant" and message.content.strip() not in text:
            raise RowRefused(f"turn {turn} ({message.role}): the template drops or rewrites its content")
    for tool in conversation.tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise RowRefused(f"the template drops the tool schema of {name}")


class BorderGlued(RowRefused):
    """A reply's first token is glued to the prompt, so that the model would meet other ids when asked."""

    def __init__(self, turn: int) -> None:
        super().__init__(f"turn {turn} (assistant): a token spans the border between the prompt and the reply")


def label_chat(rendered: Rendered, whole: Encoding, encoder: Encoder, train_reasoning: bool = True) -> Sample:
    """ids and loss_mask of a rendered chat.

    Args:
        whole: encoding of `rendered.text`.
        train_reasoning: False makes context of what stands up to a reply's </think>.

    Raises:
        BorderGlued: then `label_reply` gives each reply a sample of its own.
        RowRefused: a reply's stop token is none.
    """
    loss_mask = np.zeros(len(whole.ids), dtype=np.uint8)
    for span in rendered.spans:
        start = encoder.find_border(whole, span.prompt)
        if start is None:
            raise BorderGlued(span.turn)
        stop_at = _find_stop(whole, start, span.end, encoder.stop)
        if stop_at is None:
            raise RowRefused(f"turn {span.turn} (assistant): its stop token is not a token of its own")
        said = span.start if train_reasoning else _said_from(rendered, span)
        if said > len(span.prompt):
            start += sum(whole.span(index)[1] <= said for index in range(start, stop_at))
        loss_mask[start : stop_at + 1] = 1
    return Sample(np.array(whole.ids, dtype=np.uint32), loss_mask)


def label_reply(rendered: Rendered, span: Span, encoder: Encoder, train_reasoning: bool = True) -> Sample:
    """One reply behind its prompt, the two encoded apart, as they are when the model is asked and answers.

    Raises:
        RowRefused: the tokenizer writes a text otherwise once it is cut there (SentencePiece puts a blank in front).
    """
    text = rendered.text[len(span.prompt) : span.end]
    prompt, reply = encoder.encode_texts([span.prompt, text])
    if not (prompt.is_exact and reply.is_exact):
        raise RowRefused(REFUSED_INEXACT)
    if not encoder.joins(prompt.ids, reply.ids, text):
        raise BorderGlued(span.turn)
    if reply.ids[-1] != encoder.stop.id or reply.span(len(reply.ids) - 1)[1] != len(text):
        raise RowRefused(f"turn {span.turn} (assistant): its stop token is not a token of its own")
    start = len(prompt.ids)
    ids = np.array([*prompt.ids, *reply.ids], dtype=np.uint32)
    said = (span.start if train_reasoning else _said_from(rendered, span)) - len(span.prompt)
    if said:
        start += sum(reply.span(index)[1] <= said for index in range(len(reply.ids) - 1))
    return Sample(ids, (np.arange(len(ids)) >= start).astype(np.uint8))


def _said_from(rendered: Rendered, span: Span) -> int:
    """The character where a reply begins behind its thoughts."""
    body = rendered.text[len(span.prompt) : span.end]
    thought = body.rfind(_END_THINK) + len(_END_THINK) if _END_THINK in body else 0
    return max(span.start, len(span.prompt) + len(body) - len(body[thought:].lstrip()))


def train_all(sample: Sample) -> Sample:
    """Every token of a chat trained, the questions too (data.train_on all)."""
    return Sample(sample.input_ids, np.ones_like(sample.loss_mask))


def _find_stop(encoding: Encoding, start: int, end: int, stop: StopToken) -> int | None:
    """Index of the stop token that ends at a character, behind a reply that starts at a token."""
    index = encoding.first_from(end - len(stop.text))
    is_stop = start <= index < len(encoding.ids) and encoding.ids[index] == stop.id and encoding.span(index)[1] == end
    return index if is_stop else None


def join_completion(conversation: Conversation) -> tuple[str, str]:
    """Prompt and completion of a row for data.chat_template none."""
    *context, reply = conversation.messages
    if len(context) > 1 or any(m.role != "user" for m in context) or reply.tool_calls or reply.reasoning_content:
        raise RowRefused(
            "data.chat_template none joins one prompt and one completion; this row has more turns than that"
        )
    return "".join(m.content for m in context), reply.content


def label_completion(prompt: Encoding, whole: Encoding, encoder: Encoder) -> Sample:
    """prompt + completion + EOS, the completion and EOS trained.

    Args:
        prompt: encoding of the prompt alone.
        whole: encoding of prompt and completion joined.
    """
    start = len(prompt.ids)
    if whole.ids[:start] != prompt.ids:
        raise RowRefused("a token spans the border between prompt and completion; end the prompt with a line break")
    ids = [*encoder.bos_ids, *whole.ids, encoder.stop.id]
    loss_mask = np.ones(len(ids), dtype=np.uint8)
    loss_mask[: len(encoder.bos_ids) + start] = 0
    return Sample(np.array(ids, dtype=np.uint32), loss_mask)


def label_text(encoding: Encoding, encoder: Encoder, max_seq_len: int) -> Iterator[Sample]:
    """A document with BOS and EOS where the tokenizer has them, every token trained once, split without loss.

    BOS stands in front even where the tokenizer adds none to prompts: it is what the first token is predicted from.
    For the same reason each later piece begins with the last token of the piece before, as context.
    """
    bos = [encoder.bos_id] if encoder.bos_id is not None else []
    eos = [encoder.eos_id] if encoder.eos_id is not None else []
    ids = np.array([*bos, *encoding.ids, *eos], dtype=np.uint32)
    for start in range(0, max(1, len(ids) - 1), max_seq_len - 1):
        piece = ids[start : start + max_seq_len]
        loss_mask = np.ones(len(piece), dtype=np.uint8)
        if start or bos:
            loss_mask[0] = 0
        yield Sample(piece, loss_mask)
