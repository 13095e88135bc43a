"""Split a reply's text into reasoning, content and tool calls, as the model's own template writes them.

The whole text and the text in pieces go through the same reader, so both give the same parts. Text in none of the
template's shapes is content. Only what a model has written is read here, never what a user has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from tunesmith.chat_template.habits import THINK_TAGS
from tunesmith.chat_template.template import NO_VARIABLES, RenderSettings
from tunesmith.encode.encoder import Encoder
from tunesmith.generation.reply_json import JsonScanner, find_call, read_value, schema_types, typed_value
from tunesmith.generation.reply_patterns import ReplyPatterns
from tunesmith.generation.reply_shapes import ReplyShapes, find_reply_shapes

_WAIT = object()  # more text may make a match
_THINK = regex.compile(r"\s{0,8}(?:" + "|".join(regex.escape(first) for first, _ in THINK_TAGS) + r")\s?")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call in a reply.

    Attributes:
        arguments: the JSON value of `text`; `text` itself where it is not JSON.
        text: the arguments as JSON text; of a reply that was cut off, the beginning of it.
    """

    name: str
    arguments: Any
    text: str


@dataclass(frozen=True, slots=True)
class ReplyParts:
    """The parts of a reply."""

    reasoning: str
    content: str
    tool_calls: Sequence[ToolCall]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a part, as it becomes known.

    Attributes:
        kind: "call" begins a tool call, whose name is `text`; "arguments" continues the last one; "call_end" ends it.
    """

    kind: Literal["reasoning", "content", "call", "arguments", "call_end"]
    text: str


class ReplyFormat:
    """How a model writes replies."""

    def __init__(self, shapes: ReplyShapes) -> None:
        self.shapes = shapes
        self.patterns = ReplyPatterns(shapes)

    @property
    def writes_calls(self) -> bool:
        """Whether tool calls can be told from content."""
        return self.patterns.calls is not None

    def parse(self, text: str, has_tools: bool = True, tools: Sequence[Mapping[str, Any]] = ()) -> ReplyParts:
        """The parts of a whole reply, without its stop token; for the arguments see `ReplyReader`."""
        reader = ReplyReader(self, has_tools, tools)
        return join_parts([*reader.push(text), *reader.finish()])


def reply_format(encoder: Encoder, variables: Mapping[str, Any] = NO_VARIABLES) -> ReplyFormat:
    """The format of replies to prompts of an encoder, under these template variables."""
    settings = RenderSettings(encoder.defaults.date, {**encoder.defaults.variables, **variables})
    renderer = encoder.renderer(settings)
    if renderer is None:
        return ReplyFormat(ReplyShapes())
    return ReplyFormat(find_reply_shapes(renderer, [encoder.stops.words, encoder.stops.call]))


def join_parts(parts: Iterable[Part]) -> ReplyParts:
    """The whole parts of a reply from its pieces."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        if part.kind == "call":
            calls.append((part.text, []))
        elif part.kind == "arguments":
            calls[-1][1].append(part.text)
        elif part.kind != "call_end":
            texts[part.kind].append(part.text)
    whole = [(name, "".join(pieces)) for name, pieces in calls]
    made = [ToolCall(name, _loaded(text), text) for name, text in whole]
    return ReplyParts("".join(texts["reasoning"]), "".join(texts["content"]), made)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class ReplyReader:
    """Reads one reply piece by piece.

    Args:
        has_tools: whether the model was given tools; without, calls are content.
        tools: their schemas, which tell the text "7" from a number where the template writes both alike.
    """

    def __init__(self, form: ReplyFormat, has_tools: bool = True, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._form = form.patterns
        self._calls = form.patterns.calls if has_tools else None
        self._types = {name: types for tool in tools for name, types in _types_of(tool)}
        self._buffer, self._before = "", "\n"  # what is not yet read, and the character before it
        self._blanks = ""
        self._is_last = False
        self._parts: list[Part] = []
        self._name, self._num_arguments = "", 0
        self._scanner = JsonScanner()
        self._key = self._opening = ""
        self._read: Callable[[], bool] = self._begin_reasoning if form.patterns.begins_inside else self._begin

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends within reasoning."""
        return self._read in (self._begin_reasoning, self._reasoning)

    def push(self, text: str) -> list[Part]:
        """The parts that the text so far makes certain."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Part]:
        """The parts of the text that was held back."""
        self._is_last = True
        return self._run()

    def _run(self) -> list[Part]:
        while self._skip_blanks() and self._read():
            pass
        parts, self._parts = self._parts, []
        return parts

    def _skip_blanks(self) -> bool:
        """Drop what is left of the white space behind a marker; False: more text may bring it."""
        while self._blanks and self._buffer:
            is_next = self._buffer[0] == self._blanks[0]
            self._blanks = self._blanks[1:] if is_next else ""
            self._take(int(is_next))
        return not self._blanks or self._is_last

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        self._before = taken[-1:] or self._before
        return taken

    def _emit(self, kind: Any, text: str) -> None:
        if text or kind in ("call", "call_end"):
            self._parts.append(Part(kind, text))

    def _match(self, pattern: Any) -> Any:
        """A match at the begin of the buffer; None if there is none, _WAIT if more text may make one."""
        found = pattern.match(self._buffer, partial=not self._is_last)
        return _WAIT if found is not None and found.partial else found

    def _search(self, patterns: Sequence[Any]) -> tuple[int, Any]:
        """Where the earliest match of some patterns begins, and the match: None without one, _WAIT if it is partial."""
        text = self._before + self._buffer
        best: tuple[int, Any] = (len(self._buffer), None)
        for pattern in patterns:
            found = pattern.search(text, 1, partial=not self._is_last)
            if found is not None and found.start() - 1 < best[0]:
                best = (found.start() - 1, _WAIT if found.partial else found)
        return best

    # Each of the following reads from the buffer and returns whether to go on; False: more text is needed.

    def _begin(self) -> bool:
        """The begin of a segment: reasoning, content or a call."""
        markers = [(self._form.think_open, self._reasoning)] if self._form.think_open else []
        for marker, read in [*markers, *((marker, self._content) for marker in self._form.content_opens)]:
            found = self._match(marker.pattern)
            if found is _WAIT:
                return False
            if found is not None:
                self._take(found.end())
                self._blanks, self._read = marker.blanks, read
                return True
        self._blanks, self._read = self._form.content_blanks, self._content
        return True

    def _begin_reasoning(self) -> bool:
        """Reasoning that the prompt has begun; some models write its opening tag once more."""
        found = self._match(_THINK)
        if found is _WAIT:
            return False
        self._take(found.end() if found else 0)
        self._read = self._reasoning
        return True

    def _reasoning(self) -> bool:
        closing = self._form.think_close
        start, found = self._search([closing.pattern] if closing else [])
        self._emit("reasoning", self._take(start))
        if closing is None or found is None or found is _WAIT:
            return False
        self._take(found.end() - found.start())
        self._blanks = closing.blanks
        self._read = self._begin if self._form.content_opens else self._content
        return True

    def _content(self) -> bool:
        """Text until a call or the end of its segment."""
        calls = [self._calls.first, self._calls.first_object] if self._calls else []
        closings = [marker.pattern for marker in self._form.content_closes]
        start, found = self._search([*closings, *filter(None, calls)])
        self._emit("content", self._take(start))
        if found is None or found is _WAIT:
            return False
        if found.re in calls:
            return self._start_call(found, start + 1)
        self._take(found.end() - found.start())
        self._read = self._begin
        return True

    def _start_call(self, found: Any, shift: int) -> bool:
        """Begin the call that a pattern has found, `shift` characters before the buffer's begin."""
        groups = found.re.groupindex
        if "object" in groups:
            self._opening = self._take(found.start("object") - shift)
            self._scanner = JsonScanner()
            self._read = self._object
            return True
        name = found["name"]
        self._name = str(_loaded(f'"{name}"')) if self._calls and self._calls.keys else name
        self._emit("call", self._name)
        self._num_arguments = 0
        self._scanner = JsonScanner()
        if "arguments" in groups:
            self._take(found.start("arguments") - shift)
            self._read = self._arguments
        else:
            self._take(found.end() - shift)
            self._emit("arguments", "{")
            self._read = self._entry
        return True

    def _object(self) -> bool:
        """A JSON object that may be a call, with its keys in any order."""
        assert self._calls is not None
        end = self._scanner.feed(self._buffer)
        if (end is None and not self._is_last) or not self._buffer:
            return False
        text = self._take(len(self._buffer) if end is None else end)
        call = find_call(text, self._calls) if end is not None else None
        if call is None:
            self._emit("content", self._opening + text)
            self._read = self._content
            return True
        self._emit("call", call[0])
        self._emit("arguments", call[1])
        self._emit("call_end", "")
        self._read = self._tail
        return True

    def _arguments(self) -> bool:
        """Arguments that are one JSON value, passed on as they come."""
        done = self._scanner.position
        end = self._scanner.feed(self._buffer)
        if self._buffer[:1] in ("{", "["):
            self._emit("arguments", self._buffer[done : len(self._buffer) if end is None else end])
        elif end is not None or self._is_last:  # JSON text in a JSON text, or null
            self._emit("arguments", read_value(self._buffer[:end]))
        if end is None:
            return False
        self._take(end)
        self._emit("call_end", "")
        self._scanner = JsonScanner(self._calls.depth if self._calls and self._calls.keys else 0)
        self._read = self._object_tail if self._scanner.depth else self._tail
        return True

    def _object_tail(self) -> bool:
        """The rest of a call's JSON object, such as its id."""
        end = self._scanner.feed(self._buffer)
        self._take(len(self._buffer) if end is None else end)
        if end is None:
            self._scanner.position = 0
            return False
        self._read = self._tail
        return True

    def _entry(self) -> bool:
        """The key of the next argument, or the end of the arguments."""
        assert self._calls is not None
        ending = self._match(self._calls.tail) if self._calls.tail else None
        found = self._match(self._calls.entry.pattern) if ending is None else None
        if ending is _WAIT or found is _WAIT:
            return False
        if found is None:
            if not self._buffer and self._is_last:
                return False
            self._emit("arguments", "}")
            self._emit("call_end", "")
            self._read = self._tail
            return True
        self._key = found["key"].strip()
        self._take(found.end())
        self._blanks = self._calls.entry.blanks
        self._scanner = JsonScanner()
        self._read = self._value
        return True

    def _value(self) -> bool:
        """The value of an argument."""
        assert self._calls is not None
        assert self._calls.entries is not None
        found = self._json_value() if self._calls.entries.quote else self._bare_value()
        if found is None:
            return False
        self._take(found[1])
        value = found[0]
        begin = ", " if self._num_arguments else ""
        self._num_arguments += 1
        self._emit("arguments", f"{begin}{_dumped(self._key)}: {_dumped(value)}")
        self._read = self._entry
        return True

    def _json_value(self) -> tuple[Any, int] | None:
        """An argument that is JSON, or a text in the template's own quotes, and where it ends; None: not yet."""
        quote = self._calls.entries.quote if self._calls and self._calls.entries else ""
        if quote != '"' and not self._is_last and quote.startswith(self._buffer[: len(quote)]):
            end = self._buffer.find(quote, len(quote)) if self._buffer.startswith(quote) else -1
            return None if end < 0 else (self._buffer[len(quote) : end], end + len(quote))
        end_of_json = self._scanner.feed(self._buffer)
        if end_of_json is None:
            return None
        return _loaded(self._buffer[:end_of_json]), end_of_json

    def _bare_value(self) -> tuple[Any, int] | None:
        """An argument that is written without quotes, and where it ends; None: not yet."""
        assert self._calls is not None
        _, found = self._search([self._calls.entry_end])
        if found is None or found is _WAIT:
            return None
        types = self._types.get(self._name, {}).get(self._key)
        return typed_value(self._buffer[: found.start() - 1], types), found.end() - 1

    def _tail(self) -> bool:
        """The text after a call."""
        assert self._calls is not None
        if self._calls.tail is not None:
            found = self._match(self._calls.tail)
            if found is _WAIT:
                return False
            self._take(found.end() if found else 0)
        self._read = self._after_call
        return True

    def _after_call(self) -> bool:
        """Another call, the end of the calls, or content."""
        assert self._calls is not None
        for pattern in filter(None, (self._calls.following, self._calls.following_object)):
            found = self._match(pattern)
            if found is _WAIT:
                return False
            if found is not None:
                return self._start_call(found, 0)
        if self._calls.closing is not None:
            found = self._match(self._calls.closing)
            if found is _WAIT:
                return False
            self._take(found.end() if found else 0)
        self._take(len(self._buffer) - len(self._buffer.lstrip()))
        if not self._buffer:
            return False
        self._read = self._begin if self._form.content_opens else self._content
        return True


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _types_of(tool: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, frozenset[str]]]]:
    """Name of a tool, and the JSON types that its schema allows for each argument."""
    function = tool.get("function", tool)
    properties = (function.get("parameters") or {}).get("properties") if isinstance(function, Mapping) else None
    if isinstance(properties, Mapping) and isinstance(function.get("name"), str):
        yield function["name"], {str(key): schema_types(schema) for key, schema in properties.items()}
