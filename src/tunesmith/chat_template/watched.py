"""Find where each turn ends in one rendering, to know what the template writes for a shorter chat.

The prompt of a reply is the rendering of the turns before it. Rendering every prompt separately costs quadratic time.
But what a template has written before it first reads message k is what it would have written if the chat ended there.
So one rendering, with messages that record how far they were read, gives the prompts of all replies, for templates that
iterate over the messages once and then end with text that no message affects. Where the program reads ahead, or from
the end, the shorter chat is rendered separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from tunesmith.chat_template.program import run_template
from tunesmith.chat_template.sandbox import CLOSE, OPEN, TURN, call_internal

_ASK = "add_generation_prompt"
_BEYOND = 1 << 30
_WRITES = (nodes.Output, nodes.ExprStmt, nodes.CallBlock, nodes.FilterBlock, nodes.Include, nodes.Import)


class WatchedMessages(Sequence[Any]):
    """Messages that record how many of them a template has read: `seen`, or all where it reads the length."""

    def __init__(self, turns: Sequence[Any], start: int = 0, watch: list[int] | None = None) -> None:
        self._turns, self._start = turns, start
        self._watch = watch if watch is not None else [0]

    @property
    def seen(self) -> int:
        return self._watch[0]

    @property
    def total(self) -> int:
        """Number of messages; does not count as reading."""
        return max(0, len(self._turns) - self._start)

    def unwatched(self) -> list[Any]:
        return list(self._turns[self._start :])

    def _see(self, count: int) -> None:
        if count > self._watch[0]:
            self._watch[0] = count if count <= len(self._turns) else _BEYOND

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._start, len(self._turns)):
            self._see(index + 1)
            yield self._turns[index]
        self._see(_BEYOND)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            if (key.start or 0) >= 0 and key.stop is None and key.step in (None, 1):
                return WatchedMessages(self._turns, self._start + (key.start or 0), self._watch)
            self._see(_BEYOND)
            return list(self._turns[self._start :])[key]
        if not isinstance(key, int) or key < 0:
            self._see(_BEYOND)
            return list(self._turns[self._start :])[key]
        self._see(self._start + key + 1)
        return self._turns[self._start + key]

    def __getattr__(self, name: str) -> Any:
        """Other attributes of a list, so that templates find what they find in a list."""
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr([], name)
        self._see(_BEYOND)
        return getattr(self.unwatched(), name) if callable(found) else found

    def __bool__(self) -> bool:
        self._see(self._start + 1)
        return self._start < len(self._turns)

    def __len__(self) -> int:
        self._see(_BEYOND)
        return max(0, len(self._turns) - self._start)

    def __eq__(self, other: object) -> bool:
        self._see(_BEYOND)
        return list(self._turns[self._start :]) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self._see(_BEYOND)
        return repr(list(self._turns[self._start :]))


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's text; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [call_internal(OPEN, [], line), *body, call_internal(CLOSE, [], line)]


@dataclass(frozen=True, slots=True)
class Watched:
    """A rendering, and what was recorded meanwhile.

    Attributes:
        ends: {k: number of characters that depend on the first k turns only}.
        marks: characters [start, end) between {% generation %} and {% endgeneration %}.
    """

    text: str
    ends: dict[int, int]
    marks: tuple[tuple[int, int], ...]


def render_watched(
    template: jinja2.Template, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Watched:
    """The text of all turns.

    Args:
        template: made by `compile_watched`.
        variables: all variables of the template besides messages.
    """
    places = {id(turn): index for index, turn in enumerate(turns)}
    messages, done = WatchedMessages(turns), {}
    opened: list[int] = []
    closed: list[int] = []

    def watch(event: str, value: Any, written: int) -> None:
        if event == OPEN:
            opened.append(written)
        elif event == CLOSE:
            closed.append(written)
        else:
            index = places.get(id(value))
            if index is not None and messages.seen <= index + 1:
                done[index + 1] = written

    text, lengths = run_template(template, {**variables, "messages": messages}, watch)
    ends = {count: lengths[written - 1] for count, written in done.items()}
    pairs = zip(opened, closed, strict=True) if len(opened) == len(closed) else ()
    # a mark inside a macro is reached before its text is written, so it comes out empty and is ignored
    marks = tuple((lengths[a - 1], lengths[b - 1]) for a, b in pairs if lengths[b - 1] > lengths[a - 1])
    return Watched(text, ends, marks)


def compile_watched(environment: jinja2.Environment, text: str) -> jinja2.Template:
    """The template with a mark at the end of each turn, unless its end may depend on the messages."""
    tree = environment.parse(text)
    _drop_idle(tree)
    loops = [node for node in tree.body if isinstance(node, nodes.For) and _writes(node)]
    if loops and (mark := _turn_mark(tree, loops[-1])):
        loops[-1].body.append(mark)
    return environment.from_string(tree)


def _turn_mark(tree: nodes.Template, loop: nodes.For) -> nodes.ExprStmt | None:
    place = tree.body.index(loop)
    if not isinstance(loop.target, nodes.Name) or loop.else_ or loop.recursive:
        return None
    if not _is_constant(tree.body[place + 1 :], tree) or any(_reads_ask(node) for node in tree.body[: place + 1]):
        return None
    return call_internal(TURN, [nodes.Name(loop.target.name, "load", lineno=loop.lineno)], loop.lineno)


def _writes(node: nodes.Node) -> bool:
    return any(node.find(kind) is not None for kind in _WRITES)


def _drop_idle(tree: nodes.Template) -> None:
    """Remove statements that write nothing and set only unused variables (MiniMind has such a loop from Qwen3)."""
    for node in [*tree.body]:
        if isinstance(node, nodes.For) and not _writes(node):
            sets = {ref.name for ref in node.find_all(nodes.NSRef)}
        elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            sets = {node.target.name}
        else:
            continue
        calls = {call.node.name for call in node.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
        rest = [other for other in tree.body if other is not node]
        read = {name.name for other in rest for name in _names(other) if name.ctx == "load"}
        written = {ref.name for other in rest for ref in other.find_all(nodes.NSRef)}
        if calls <= {"namespace"} and not sets & (read | written):
            tree.body.remove(node)
            _drop_idle(tree)
            return


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)


def _is_constant(tail: list[nodes.Node], tree: nodes.Template) -> bool:
    """Whether the program after the last loop reads settings only, which are the same for every chat."""
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
    assigned |= {macro.name for macro in tree.find_all(nodes.Macro)}
    settled = {
        node.target.name
        for node in tree.body
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Const)
    }
    often = [n.name for n in tree.find_all(nodes.Name) if n.ctx == "store"]
    settled = {name for name in settled if often.count(name) == 1}
    varying = (assigned - settled - {_ASK}) | {"messages", "tools", "documents", "loop"}
    return not any(name.name in varying for node in tail for name in _names(node))


def _reads_ask(node: nodes.Node) -> bool:
    """Whether anything but `add_generation_prompt is defined` depends on it (a default for it never applies)."""
    if isinstance(node, nodes.Test) and node.name in ("defined", "undefined"):
        return False
    if isinstance(node, nodes.If) and _asks_undefined(node.test):
        return any(_reads_ask(below) for below in [*node.elif_, *node.else_])
    if isinstance(node, nodes.Name) and node.name == _ASK:
        return True
    return any(_reads_ask(below) for below in node.iter_child_nodes())


def _asks_undefined(test: nodes.Node) -> bool:
    if isinstance(test, nodes.Not):
        inner = test.node
        return isinstance(inner, nodes.Test) and inner.name == "defined" and _is_ask(inner.node)
    return isinstance(test, nodes.Test) and test.name == "undefined" and _is_ask(test.node)


def _is_ask(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _ASK
