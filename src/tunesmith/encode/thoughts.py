"""Find the untrained parts of a reply: reasoning under data.train_reasoning false, and spans excluded by the row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tunesmith.chat_template.habits import THINK_TAGS, Habits
from tunesmith.chat_template.trace import Place
from tunesmith.encode.shield import MARK
from tunesmith.rows.conversation import Message, RowRefused

_BLOCK = re.compile("|".join(rf"{re.escape(a)}.*?{re.escape(b)}\s*" for a, b in THINK_TAGS), re.DOTALL)
_TAG = re.compile("|".join(re.escape(tag) for pair in THINK_TAGS for tag in pair))
_END_THINK = "</think>"


def has_thoughts(text: str) -> bool:
    """Whether a text has the reasoning tags of any known model family."""
    return _TAG.search(text.replace(MARK, "")) is not None


def begins_with_thoughts(text: str) -> bool:
    """Whether a text begins with a think block of any known model family, which may be empty."""
    return _BLOCK.match(text.lstrip()) is not None


def find_context(
    message: Message, own: Sequence[Place], text: str, start: int, habits: Habits, train_reasoning: bool, turn: int
) -> tuple[tuple[int, int], ...]:
    """Characters of a reply that are not trained, sorted and merged.

    Args:
        own: places of the turn's parts in `text`.
        start: where the reply begins.

    Raises:
        RowRefused: these characters cannot be determined.
    """
    spans = list(_spans_of_content(message, own, turn))
    if spans and spans[0][0] == own[0].start:
        spans[0] = (start, spans[0][1])  # text before a prefill is part of the prompt as well
    if not train_reasoning and (said_from := _said_from(message, own, text, start, habits, turn)) > start:
        spans.append((start, said_from))
    return _merge(spans)


def _said_from(message: Message, own: Sequence[Place], text: str, start: int, habits: Habits, turn: int) -> int:
    """The character where the reply continues after its reasoning."""
    thoughts = [place for place in own if place.part.kind == "reasoning"]
    words = [place for place in own if place.part.kind != "reasoning"]
    if thoughts:
        end, closing = thoughts[-1].end, habits.closing
        if closing is None and text[end:].lstrip().startswith(_END_THINK):
            closing = text[end : text.index(_END_THINK, end) + len(_END_THINK)]
        if closing is None or not text.startswith(closing, end) or any(p.start < end for p in words):
            raise RowRefused(
                f"turn {turn} (assistant): the end of its reasoning cannot be found, as data.train_reasoning false "
                "requires",
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
    for closing in (habits.closing or "", _END_THINK):  # an empty reasoning block written by the template
        at = text.rfind(closing.strip(), start, first) if closing.strip() else -1
        if at >= 0:
            end = at + len(closing.strip())
            return end + _blanks(text, end, words)
    return start


def _thoughts_in(text: str, content: Place, turn: int) -> int | None:
    """Where the reasoning at the start of the turn's own text ends, for templates without a separate field for it.

    Raises:
        RowRefused: there are reasoning tags elsewhere in the text.
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
            f"turn {turn} (assistant): its reasoning cannot be told from its answer, as data.train_reasoning false "
            "requires",
            code="thoughts-not-told-apart",
        )
    return places[at] if at < len(places) else content.end


def _blanks(text: str, at: int, words: Sequence[Place]) -> int:
    """White space between the end of the reasoning and the first word."""
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
            f"turn {turn} (assistant): the template rewrites its content, so that its untrained part cannot be found",
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
