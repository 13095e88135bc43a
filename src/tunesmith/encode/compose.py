"""Build a reply for a template whose finished turn does not begin with its generation prompt.

The body is what the template writes for this turn after the point where its generation prompt ends. The only text added
is the end of the thinking, where the prompt opens it and the template writes no reasoning (DeepSeek-R1, QwQ and their
distilled models): it is closed as these models close it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.chat_template.beginnings import Beginnings
from tunesmith.chat_template.habits import THINK, Habits
from tunesmith.chat_template.trace import Place, Trace, trace_rendering
from tunesmith.rows.conversation import Message, RowRefused

END_THINK = "</think>"
_R1_CLOSING = f"\n{END_THINK}\n\n"
_STAND_IN = "tsthought"


@dataclass(frozen=True, slots=True)
class Composed:
    """A reply without its stop token, and the places of its parts in it."""

    body: str
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A turn as the template writes it at the end of a chat.

    Attributes:
        prompt: text that the model gets before the reply.
        own: places of the turn's parts in `text`.
        end: where the reply ends in `text`.
        others: starts of the parts of other turns in `text`.
    """

    prompt: str
    text: str
    own: tuple[Place, ...]
    end: int
    others: tuple[int, ...] = ()

    def cut(self, start: int, lead: str = "") -> Composed:
        """The reply from a character of the text on, with `lead` in front.

        Raises:
            RowRefused: the template writes other turns there as well.
        """
        if any(start <= at < self.end for at in self.others):
            raise RowRefused(
                "the template writes other turns into a reply. Choose another template with --data.chat_template",
                code="others-in-reply",
            )
        shift = len(lead) - start
        places = (replace(p, start=p.start + shift, end=p.end + shift) for p in self.own if p.start >= start)
        return Composed(lead + self.text[start : self.end], tuple(places))


def compose_reply(
    habits: Habits,
    message: Message,
    turn: int,
    prompt: str,
    before: Trace,
    beginnings: Beginnings,
    trace: Trace,
    stop: str,
) -> Composed | None:
    """The reply of the last turn of `beginnings`; None if no rule fits.

    Args:
        before: trace of the prompt.
        trace: trace of the finished turns.
        stop: text of the stop token.

    Raises:
        RowRefused: its reasoning can never be written after this prompt.
    """
    opens = prompt.rstrip().endswith(THINK)
    if prompt.rstrip().endswith(END_THINK) and message.reasoning_content:
        raise RowRefused(
            "the template's generation prompt closes the thinking before the reply, so its reasoning_content could "
            "never be generated; open it with a template variable (--data.template_kwargs.enable_thinking true, "
            "open_thinking true)",
            code="thinking-closed",
        )
    own = trace.of_turn(turn)
    others = tuple(place.start for place in trace.places if place.part.turn != turn)
    done = Finished(prompt, trace.text, tuple(own), _find_end(trace.text, own, message, stop), others)
    if not own or done.end < own[-1].end:
        return None
    if beginnings.marks:
        start, end = beginnings.marks[-1]
        return replace(done, end=min(end, done.end)).cut(start) if start <= own[0].start else None
    if habits.writes_reasoning and (composed := _behind_opened(habits, message, turn, done, beginnings, stop)):
        return composed
    if opens:
        return _as_r1(message, turn, done, trace) if prompt.endswith(f"{THINK}\n") else None
    return _aligned(habits, done, before, beginnings.until(turn), trace, turn)


def _find_end(text: str, own: Sequence[Place], message: Message, stop: str) -> int:
    """Index of the stop token after a turn, or the end of the turn's text if the template writes no stop token."""
    if not own:
        return -1
    end = own[-1].end
    stop_at = text.find(stop, end)
    if stop_at >= 0:
        return stop_at
    if own[-1].part.kind != "content":
        return len(text.rstrip())
    blanks = message.content[len(message.content.rstrip()) :]
    return end + len(blanks) if text.startswith(blanks, end) else end


def _behind_opened(
    habits: Habits, message: Message, turn: int, done: Finished, beginnings: Beginnings, stop: str
) -> Composed | None:
    """A reply after a prompt that opens the thinking: its reasoning, or none, and what the template writes next."""
    thoughts = [place for place in done.own if place.part.kind == "reasoning"]
    if thoughts:
        begins_there = done.text[: thoughts[0].start].rstrip() == done.prompt.rstrip()
        return done.cut(thoughts[0].start) if begins_there else None
    thinking = {**beginnings.turns[turn], "reasoning_content": _STAND_IN, "thinking": _STAND_IN}
    turns = [*beginnings.turns[:turn], thinking]
    text = beginnings.render(turns, beginnings.tools)
    trace = trace_rendering(text, turns, beginnings.tools, lambda turns, tools, _: beginnings.render(turns, tools))
    own = trace.of_turn(turn)
    thoughts = [place for place in own if place.part.kind == "reasoning"]
    if not thoughts or thoughts[0] is not own[0] or text[: own[0].start].rstrip() != done.prompt.rstrip():
        return None
    finished = Finished(done.prompt, text, tuple(own[1:]), _find_end(text, own, message, stop))
    return finished.cut(thoughts[0].end) if finished.end >= own[-1].end else None


def _as_r1(message: Message, turn: int, done: Finished, trace: Trace) -> Composed | None:
    """Reasoning, "</think>" and an empty line, then what the template writes without its own thinking."""
    thought = (message.reasoning_content or "").strip()
    head = done.prompt.rstrip().removesuffix(THINK)
    words = [place for place in done.own if place.part.kind != "reasoning"]
    if not words:
        return None
    start = words[0].start
    if done.text.startswith(head) and len(head) <= start:
        opening = done.text[len(head) : start].rpartition(END_THINK)[2].lstrip()
        start -= len(opening)
    composed = replace(done, own=tuple(words)).cut(start, thought + _R1_CLOSING)
    if not thought:
        return composed
    parts = [p.part for p in done.own] + trace.missing + trace.rewritten
    part = next(part for part in parts if part.turn == turn and part.kind == "reasoning")
    return replace(composed, places=(Place(part, 0, len(thought)), *composed.places))


def _aligned(habits: Habits, done: Finished, before: Trace, unasked: str, trace: Trace, turn: int) -> Composed | None:
    """What the template writes after the position where its generation prompt ends, relative to the last part before.

    Args:
        unasked: the same turns rendered without the generation prompt.
    """
    first = done.own[0].start
    earlier = [place for place in trace.places if place.end <= first and place.part.turn != turn]
    gap = trace.text[earlier[-1].end if earlier else 0 : first]
    if before.places and earlier and before.places[-1].part == earlier[-1].part:
        asked = done.prompt[before.places[-1].end :]
        if gap.startswith(asked):
            return done.cut(first - len(gap) + len(asked))
    asked = done.prompt[len(unasked) :] if done.prompt.startswith(unasked) else ""
    if asked.strip() and asked.rstrip() in gap:
        written = asked if asked in gap else asked.rstrip()
        return done.cut(first - len(gap.rpartition(written)[2]))
    head, opened, closed = asked.partition(THINK)
    if opened and closed.rstrip().endswith(END_THINK) and head.strip() and head in gap:
        opening = gap.rpartition(head)[2].rpartition(END_THINK)[2].lstrip()
        behind = (habits.closing or "").partition(END_THINK)[2]
        lead = "" if done.prompt.endswith(behind) else behind
        return done.cut(first - len(opening), lead)
    return None
