"""Find the parts of a reply that are context: untrained thoughts, and what the row leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tunesmith.chat_template.habits import Habits
from tunesmith.chat_template.trace import Place
from tunesmith.encode.shield import MARK
from tunesmith.rows.conversation import Message, RowRefused

_TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
_BLOCK = re.compile("|".join(rf"{re.escape(a)}.*?{re.escape(b)}\s*" for a, b in _TAGS), re.DOTALL)
_TAG = re.compile("|".join(re.escape(tag) for pair in _TAGS for tag in pair))
_END_THINK = "</think>"


def has_thoughts(text: str) -> bool:
    """Whether a text has the tags of any family of reasoning models."""
    return _TAG.search(text.replace(MARK, "")) is not None


def find_context(
    message: Message, own: Sequence[Place], text: str, start: int, habits: Habits, train_reasoning: bool, turn: int
) -> tuple[tuple[int, int], ...]:
    """Characters of a reply that are not trained, sorted and merged.

    Args:
        own: places of the turn's parts in `text`.
        start: where the reply begins.

    Raises:
        RowRefused: it cannot be told which characters these are.
    """
    spans = list(_spans_of_content(message, own, turn))
    if spans and spans[0][0] == own[0].start:
        spans[0] = (start, spans[0][1])  # text before a prefill is part of the prompt as well
    if not train_reasoning and (said_from := _said_from(message, own, text, start, habits, turn)) > start:
        spans.append((start, said_from))
    return _merge(spans)


def _said_from(message: Message, own: Sequence[Place], text: str, start: int, habits: Habits, turn: int) -> int:
    """The character where a reply begins behind its thoughts."""
    thoughts = [place for place in own if place.part.kind == "reasoning"]
    words = [place for place in own if place.part.kind != "reasoning"]
    if thoughts:
        end, closing = thoughts[-1].end, habits.closing
        if closing is None and text[end:].lstrip().startswith(_END_THINK):
            closing = text[end : text.index(_END_THINK, end) + len(_END_THINK)]
        if closing is None or not text.startswith(closing, end) or any(p.start < end for p in words):
            raise RowRefused(
                f"turn {turn} (assistant): it cannot be told where its thoughts end (data.train_reasoning false)",
                code="thoughts-end-unknown",
            )
        content = next((place for place in words if place.part.kind == "content"), None)
        in_text = _thoughts_in(text, content, turn) if content else None
        return in_text or end + len(closing) + _blanks(text, end + len(closing), words)
    content = next((place for place in words if place.part.kind == "content"), None)
    in_text = _thoughts_in(text, content, turn) if content else None
    if in_text is not None:
        return in_text
    first = words[0].start if words else len(text)
    for closing in (habits.closing or "", _END_THINK):  # an empty block of thoughts that the template wrote
        at = text.rfind(closing.strip(), start, first) if closing.strip() else -1
        if at >= 0:
            end = at + len(closing.strip())
            return end + _blanks(text, end, words)
    return start


def _thoughts_in(text: str, content: Place, turn: int) -> int | None:
    """Where the thoughts end that a turn's own text begins with, for templates that have no place for them.

    Raises:
        RowRefused: there are tags of thoughts in it elsewhere.
    """
    said = text[content.start : content.end].replace(MARK, "")
    if not _TAG.search(said):
        return None
    places = [place for place in range(content.start, content.end) if text[place] != MARK]
    at = 0
    while block := _BLOCK.match(said, at):
        at = block.end()
    if _TAG.search(said, at):
        raise RowRefused(
            f"turn {turn} (assistant): it cannot be told which of its words are thoughts (data.train_reasoning false)",
            code="thoughts-not-told-apart",
        )
    return places[at] if at < len(places) else content.end


def _blanks(text: str, at: int, words: Sequence[Place]) -> int:
    """White space between the end of the thoughts and the first word."""
    end = min((place.start for place in words if place.start >= at), default=at)
    return len(text[at:end]) - len(text[at:end].lstrip())


def _spans_of_content(message: Message, own: Sequence[Place], turn: int) -> Iterator[tuple[int, int]]:
    """The message's own context_spans, from characters of its content to characters of the text."""
    if not message.context_spans:
        return
    place = next((place for place in own if place.part.kind == "content"), None)
    said = message.content.strip()
    if place is None or place.end - place.start != len(said):
        raise RowRefused(
            f"turn {turn} (assistant): the template rewrites its content, so that the part of it that is not trained "
            "cannot be found",
            code="context-not-found",
        )
    lead = len(message.content) - len(message.content.lstrip())
    for start, end in message.context_spans:
        a, b = (min(max(0, char - lead), len(said)) for char in (start, end))
        if a < b:
            yield place.start + a, place.start + b


def _merge(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
