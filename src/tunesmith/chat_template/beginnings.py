"""Render the first turns of a chat, taken from one rendering of all turns wherever that is proven equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.chat_template.habits import PROBE_TOOL, TemplateRefused, probe_call
from tunesmith.chat_template.trace import Trace, Turns, trace_rendering
from tunesmith.chat_template.watched import Watched
from tunesmith.rows.conversation import Message

if TYPE_CHECKING:
    from tunesmith.chat_template.template import Renderer


@dataclass(frozen=True, slots=True)
class Tails:
    """What a template writes after the last turn; None where this is not known to be the same for every chat.

    Attributes:
        plain: without the generation prompt.
        asking: with it.
    """

    plain: str | None = None
    asking: str | None = None

    def of(self, add_generation_prompt: bool) -> str | None:
        return self.asking if add_generation_prompt else self.plain


def find_tails(renderer: Renderer) -> Tails:
    """The tails of stand-in chats, if all first parts of these chats, rendered separately, end in the same text."""
    found: dict[bool, str] = {}
    for messages, tools in _stand_ins():
        try:
            turns = renderer.to_turns(messages)
            whole = renderer.watch(turns, tools)
        except TemplateRefused:
            continue
        for count, end in whole.ends.items():
            for asks in (False, True):
                try:
                    text = renderer.render_turns(turns[:count], tools, asks)
                except TemplateRefused:
                    continue
                if text[:end] != whole.text[:end] or found.setdefault(asks, text[end:]) != text[end:]:
                    return Tails()
    return Tails(found.get(False), found.get(True))


def _stand_ins() -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """Chats with all kinds of turns, and their tools."""
    pairs = [Message(role, f"tsbeginning{i}") for i, role in enumerate(("user", "assistant") * 3)]
    yield pairs, []
    yield [Message("system", "tssystem"), *pairs], []
    yield pairs, [PROBE_TOOL]
    result = Message("tool", "tsresult", name="tsprobe", tool_call_id="tsmith001")
    yield [*probe_call(), result, Message("assistant", "tsend"), *pairs], [PROBE_TOOL]
    yield [*pairs[:2], Message("user", "tsasked"), Message("assistant", "tssaid", reasoning_content="tsthought")], []


class Beginnings:
    """Renderings of the first turns of a chat. `text` is all of them, `marks` are its {% generation %} blocks."""

    def __init__(
        self,
        renderer: Renderer,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        seen: Watched,
    ) -> None:
        self.text, self.marks, self._ends = seen.text, seen.marks, seen.ends
        self.turns, self.tools = turns, tools
        self._renderer, self._variables = renderer, variables

    def until(self, count: int, add_generation_prompt: bool = False) -> str:
        """What the template writes for the first `count` messages."""
        if count == len(self.turns) and not add_generation_prompt:
            return self.text
        end = self._ends.get(count)
        if end is not None and not self._variables:  # a row's own variables may decide what follows
            tail = self._renderer.tails.of(add_generation_prompt)
            if tail is not None:
                return self.text[:end] + tail
        return self.render(self.turns[:count], self.tools, add_generation_prompt)

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        documents: Sequence[Any] = (),
    ) -> str:
        """Other turns, tools or documents with this chat's variables."""
        variables = {**self._variables, "documents": list(documents)} if documents else self._variables
        return self._renderer.render_turns(turns, tools, add_generation_prompt, variables)

    def trace(self, removed: frozenset[str], count: int | None = None, add_generation_prompt: bool = False) -> Trace:
        """Where the template writes each part of the first `count` messages."""

        def render(turns: Turns, tools: Turns, documents: Sequence[Any]) -> str:
            return self.render(turns, tools, add_generation_prompt, documents)

        count = len(self.turns) if count is None else count
        text = self.until(count, add_generation_prompt)
        documents = self._variables.get("documents") or ()
        return trace_rendering(text, self.turns[:count], self.tools, render, removed, documents)
