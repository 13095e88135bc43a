"""Remove the empty think block that a template writes before a reply without reasoning (<think>\\n\\n</think>\\n\\n).

The block is known from probe chats (chat_template/habits.py) and found between two parts of the row, where all text is
the template's own, so text of a row is never removed. Whether it belongs to a reply (Qwen3) or to the generation prompt
(MiniMind), the prompt then ends where the block began, and the reply goes on behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from tunesmith.chat_template.habits import EmptyThink
from tunesmith.encode.render import Rendered, RenderedChat, Span
from tunesmith.encode.thoughts import begins_with_thoughts
from tunesmith.rows.conversation import Message


def find_unreasoned(read: Sequence[Message], prepared: Sequence[Message]) -> frozenset[int]:
    """Indices of the assistant's turns without reasoning and without an empty think block in their own text.

    Args:
        read: the turns as they are in the row.
        prepared: the same turns, with their think blocks as reasoning_content (encode/messages.py).
    """
    return frozenset(
        turn
        for turn, (before, message) in enumerate(zip(read, prepared, strict=True))
        if message.role == "assistant"
        and not (message.reasoning_content or "").strip()
        and not begins_with_thoughts(before.content)
    )


def remove_empty_think(
    rendered: RenderedChat, empty: EmptyThink, turns: Collection[int], history: str = "auto"
) -> RenderedChat:
    """The chat without the empty think blocks of these turns; the same object if it has none.

    Args:
        history: data.history; with auto, samples that differed by their blocks alone become one.
    """
    parts = tuple(_remove(part, dict(_find_blocks(part, empty, turns)), len(empty.block)) for part in rendered.parts)
    if parts == rendered.parts:
        return rendered
    whole = parts[-1]
    if rendered.how == "unrolled" and history == "auto" and all(whole.text.startswith(part.text) for part in parts):
        spans = tuple(span for part in parts for span in part.spans)
        return replace(rendered, how="as_rendered", parts=(replace(whole, spans=spans),))
    return replace(rendered, parts=parts)


def _find_blocks(rendered: Rendered, empty: EmptyThink, turns: Collection[int]) -> Iterator[tuple[int, int]]:
    """Turn and first character of each block."""
    end, seen = 0, set[int]()
    for place in rendered.places:
        turn, kind = place.part.turn, place.part.kind
        if turn in turns and turn not in seen and kind != "name":  # a name is written before the block
            seen.add(turn)
            written = rendered.text[end : place.start]
            at = written.rfind(empty.block)
            behind = written[at + len(empty.block) :]
            # behind the block there is white space of the content, or the opening of a call
            if at >= 0 and (not behind.strip() if kind == "content" else behind == empty.before_call):
                yield turn, end + at
        end = max(end, place.end)


def _remove(rendered: Rendered, blocks: Mapping[int, int], length: int) -> Rendered:
    """The text without the blocks (turn -> first character), all of the same length."""
    if not blocks:
        return rendered
    text, starts = rendered.text, sorted(blocks.values())
    kept = zip([0, *(start + length for start in starts)], [*starts, len(text)], strict=True)
    shorter = "".join(text[start:end] for start, end in kept)

    def move(char: int) -> int:
        return char - sum(min(max(char - start, 0), length) for start in starts)

    def move_span(span: Span) -> Span:
        behind = blocks[span.turn] + length if span.turn in blocks else len(text)

        def trim(char: int) -> int:
            """With data.train_reasoning false, blanks between the block and the content are context like the block."""
            return behind if text[behind:char].isspace() else char

        start, border = trim(span.start), trim(len(span.prompt))
        context = [(move(first), move(trim(last))) for first, last in span.context]
        prompt = shorter[: move(border)]
        moved = tuple((first, last) for first, last in context if first < last)
        return replace(span, prompt=prompt, start=move(start), end=move(span.end), context=moved)

    places = tuple(replace(place, start=move(place.start), end=move(place.end)) for place in rendered.places)
    return Rendered(shorter, tuple(move_span(span) for span in rendered.spans), places)
