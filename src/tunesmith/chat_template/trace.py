"""Find where a template writes each part of a conversation, by rendering it with marks.

That a reply contains a word of a tool schema does not prove that the schema was written. So each part (content,
reasoning, the names and arguments of tool calls, schemas) is rendered a second time between a pair of private-use
characters. If the text without these marks is unchanged, they show for each part whether it was written, between which
characters, and whether the text there is the row's.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import markupsafe

from tunesmith.rows.conversation import RowRefused

_PRIVATE = (0xF0000, 0x10FFFD)  # the planes for private use
_BESIDE = frozenset({"id", "doc_id", "document_id", "title", "name", "url", "source", "type", "metadata"})
"""Keys of a document besides its text."""
_RARE = (0x20000, 0x2A6DF)  # rare ideographs: printable, so that they survive a template that prints Python's repr

Turns = Sequence[Mapping[str, Any]]
Render = Callable[[Turns, Turns, Sequence[Any]], str]  # of turns, tools and documents


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a row's contents.

    Attributes:
        turn: index of its message; -1 for tool schemas and documents.
        kind: content, reasoning, name, call_name, call_key, call_value, tool_name, tool_description, document
            or document_key (its id, title and the like).
        said: its text as given to the template, stripped.
        label: its name in error messages.
        number: its index among the parts of this turn and kind.
    """

    turn: int
    kind: str
    number: int
    said: str
    label: str


@dataclass(frozen=True, slots=True)
class Place:
    """A part at characters [start, end) of a rendering."""

    part: Part
    start: int
    end: int


@dataclass
class Trace:
    """Where all parts are in a rendering.

    Attributes:
        parts: all parts of the row.
        places: sorted by start. A part may have several places or none.
        missing: parts that the template did not write.
        rewritten: parts written with another text.
    """

    text: str
    parts: list[Part] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    missing: list[Part] = field(default_factory=list)
    rewritten: list[Part] = field(default_factory=list)

    def of_turn(self, turn: int) -> list[Place]:
        return [place for place in self.places if place.part.turn == turn]


def trace_rendering(
    text: str,
    turns: Turns,
    tools: Turns,
    render: Render,
    removed: frozenset[str] = frozenset(),
    documents: Sequence[Any] = (),
) -> Trace:
    """The places of all parts of these turns in `text`.

    Args:
        text: what `render` writes for them.
        turns: messages as templates get them.
        removed: texts that the template removes from the content (SmolLM3's /no_think), which is no loss.

    Raises:
        RowRefused: the template writes something else once a text is marked.
    """
    for marker in (
        _Marker(_PRIVATE),
        _Marker(_PRIVATE, in_middle=True),
        _Marker(_RARE),
        _Marker(_RARE, in_middle=True),
    ):
        if marker.marks.search(text):
            continue
        made = marker.mark(turns, tools, documents)
        if not marker.is_free:
            continue
        marked = render(*made)
        if marker.marks.sub("", marked) == text:
            return marker.read(marked, text, removed)
    raise RowRefused(
        "the template's output depends on a text of this row in a way that hides where each part is written. Remove "
        "the row, or choose another template with --data.chat_template",
        code="parts-not-traced",
    )


class _Marker:
    """Put marks around parts, and find them in the rendering.

    Args:
        characters: the first and the last mark character.
        in_middle: one mark in the middle of a part instead of two at its ends, for templates that inspect how a text
            begins or ends (Qwen3 at <tool_response>).
    """

    def __init__(self, characters: tuple[int, int], in_middle: bool = False) -> None:
        self._first, self._last = characters
        self.marks = re.compile(f"[{chr(self._first)}-{chr(self._last)}]")
        self._in_middle = in_middle
        self._parts: list[Part] = []
        self._counts: Counter[tuple[int, str]] = Counter()
        self._called: set[str] = set()  # a tool turn's name is no new information if the call has it
        self._asked: set[int] = set()

    @property
    def is_free(self) -> bool:
        """Whether no part contains a mark character."""
        return not any(self.marks.search(part.said) for part in self._parts)

    def mark(
        self, turns: Turns, tools: Turns, documents: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
        self._asked = {number for number, turn in enumerate(turns) if turn["role"] != "assistant"}
        self._called = {call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())}
        marked = [self._mark_turn(number, turn) for number, turn in enumerate(turns)]
        labelled = [self._mark_document(document, f"document {n}") for n, document in enumerate(documents, 1)]
        return marked, [self._mark_tool(tool) for tool in tools], labelled

    def _mark_turn(self, number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        made = dict(turn)
        if isinstance(turn.get("content"), str):
            made["content"] = self._mark_text(turn["content"], number, "content", "its content")
        if turn.get("reasoning_content"):
            thoughts = self._mark_text(turn["reasoning_content"], number, "reasoning", "its reasoning_content")
            made["reasoning_content"] = thoughts
            if "thinking" in turn:
                made["thinking"] = thoughts
        if turn.get("name") and not (turn["role"] == "tool" and turn["name"] in self._called):
            made["name"] = self._mark_text(turn["name"], number, "name", "its name")
        if turn.get("tool_calls"):
            made["tool_calls"] = [self._mark_call(number, call) for call in turn["tool_calls"]]
        return made

    def _mark_call(self, number: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        label = f"its tool call {function['name']}"
        name = self._mark_text(function["name"], number, "call_name", label)
        arguments = self._mark_value(function["arguments"], number, label)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark_value(self, value: Any, number: int, label: str) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, number, "call_value", label)
        if isinstance(value, Mapping):
            # numbered in key order, so that a template that sorts the keys writes the same order
            named = {key: self._mark_key(key, number, label) for key in sorted(value, key=str)}
            return {named[key]: self._mark_value(below, number, label) for key, below in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark_value(item, number, label) for item in value]
        return value

    def _mark_key(self, key: Any, number: int, label: str) -> Any:
        """One mark: after the key, or before it where keys are sorted and one key is a prefix of another."""
        if not isinstance(key, str) or not key.strip():
            return key
        close = self._add(number, "call_key", key, label)[1]
        return close + key if self._in_middle else key + close

    def _mark_document(self, value: Any, label: str, kind: str = "document") -> Any:
        if isinstance(value, str):
            return self._mark_text(value, -1, kind, label)
        if isinstance(value, Mapping):
            return {
                key: self._mark_document(below, label, "document_key" if key in _BESIDE else kind)
                for key, below in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._mark_document(item, label, kind) for item in value]
        return value

    def _mark_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        is_wrapped = isinstance(tool.get("function"), Mapping)
        function = tool["function"] if is_wrapped else tool
        made, label = dict(function), f"the tool schema of {function.get('name')}"
        for key, kind in (("name", "tool_name"), ("description", "tool_description")):
            if isinstance(function.get(key), str):
                made[key] = self._mark_text(function[key], -1, kind, label)
        return {**tool, "function": made} if is_wrapped else made

    def _mark_text(self, text: str, turn: int, kind: str, label: str) -> str:
        said = text.strip()
        if not said:
            return text
        opened, closed = self._add(turn, kind, said, label)
        lead = len(text) - len(text.lstrip())
        if self._in_middle:
            middle = lead + max(1, len(said) // 2)
            return text[:middle] + closed + text[middle:]
        return f"{text[:lead]}{opened}{said}{closed}{text[lead + len(said) :]}"

    def _add(self, turn: int, kind: str, said: str, label: str) -> tuple[str, str]:
        number = self._first + 2 * len(self._parts)
        if number >= self._last:
            raise RowRefused(
                f"has more than {len(self._parts):,} texts in it. Split it into several rows", code="too-many-parts"
            )
        self._parts.append(Part(turn, kind, self._counts[turn, kind], said, label))
        self._counts[turn, kind] += 1
        return chr(number), chr(number + 1)

    def read(self, marked: str, text: str, removed: frozenset[str]) -> Trace:
        opened: dict[int, int] = {}
        places: list[Place] = []
        rewritten: dict[int, Part] = {}
        for count, found in enumerate(self.marks.finditer(marked)):
            number, is_close = divmod(ord(found.group()) - self._first, 2)
            at = found.start() - count
            if number >= len(self._parts):
                continue
            if not is_close:
                opened[number] = at
                continue
            span = self._span(number, opened.pop(number, None), at, text, removed)
            if span is None:
                rewritten[number] = self._parts[number]
            else:
                places.append(Place(self._parts[number], *span))
        places.sort(key=lambda place: (place.start, place.end))
        written = {place.part for place in places}
        missing = [p for n, p in enumerate(self._parts) if p not in written and n not in rewritten]
        lost = [part for part in rewritten.values() if part not in written]
        return Trace(text, self._parts, places, missing, lost)

    def _span(
        self, number: int, start: int | None, at: int, text: str, removed: frozenset[str]
    ) -> tuple[int, int] | None:
        """Characters of a part whose closing mark is at `at`; None if another text is there."""
        part = self._parts[number]
        if self._in_middle or part.kind == "call_key":
            middle = max(1, len(part.said) // 2)
            if part.kind == "call_key":
                middle = 0 if self._in_middle else len(part.said)
            for write in _WRITERS:
                before, behind = write(part.said[:middle]), write(part.said[middle:])
                if text.endswith(before, 0, at) and text.startswith(behind, at):
                    return at - len(before), at + len(behind)
            return None
        if start is None:
            return None
        flags = removed if part.turn in self._asked else frozenset[str]()
        return (start, at) if is_same(text[start:at], part.said, flags) else None


def _json_escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _ascii_escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def _repr_escaped(text: str) -> str:
    return repr(text)[1:-1]


def _html_escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _jinja_escaped(text: str) -> str:
    return str(markupsafe.escape(text))


_WRITERS: tuple[Callable[[str], str], ...] = (
    str, _json_escaped, _ascii_escaped, _repr_escaped, html.escape, _html_escaped, _jinja_escaped,
)  # fmt: skip
"""How templates may spell a text: unchanged, in JSON, in a Python repr, in HTML."""


def is_same(written: str, said: str, removed: frozenset[str] = frozenset()) -> bool:
    """Whether a template wrote the text unchanged, in JSON or HTML, or without what it always removes."""
    if any(written == write(said) for write in _WRITERS):
        return True
    for text in removed:
        said = said.replace(text, "")
    return written.strip() == said.strip()
