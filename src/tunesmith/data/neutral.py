"""Find out whether a template treats all chats with the same turns alike, whatever their texts.

A template is a program, and most templates only copy the text of a turn. This is shown by running the template on
stand-in texts and recording every operation on them: writing or joining a text and asking for its type have the same
effect for every text; searching it for `</think>` has the same effect for every text without `</think>`; its length,
first letter or upper case do not, and then no plan is made (patterns.py). A text that no operation inspected cannot
have affected anything, so any other text takes the same path through the program.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.program import build_environment, run_template
from tunesmith.chat_template.sandbox import Sandbox
from tunesmith.chat_template.template import Renderer
from tunesmith.chat_template.watched import GenerationTag
from tunesmith.rows.conversation import Message

STAND_IN = "qx{}xq"
_STAND_IN = re.compile(r"qx\d+xq")
_LOOKS_FOR = {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find", "rfind",
              "count", "removeprefix", "removesuffix", "__contains__"}  # fmt: skip
_STRIPS = {"strip", "lstrip", "rstrip", "trim"}
_TYPES = {"string", "mapping", "iterable", "sequence", "none", "defined", "undefined", "boolean", "number", "integer",
          "float", "callable", "true", "false"}  # fmt: skip
_OF_LISTS = {"length", "count", "first", "last", "list", "reverse", "items", "default", "d"}
_BY_KEY = {"selectattr", "rejectattr", "map"}
_COMPARES: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge, "lt": operator.lt,
    "lteq": operator.le, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip
_EMPTY_OR_NOT = {("gt", 0), ("lteq", 0), ("eq", 0), ("ne", 0), ("gteq", 1), ("lt", 1)}


@dataclass(frozen=True, slots=True)
class Terms:
    """Conditions under which a template treats a text like the stand-ins.

    Attributes:
        sought: texts that it must not contain.
        edges: characters that it must not begin or end with.
        largest_number: largest number that the template computes with; it may distinguish longer from shorter chats.
    """

    sought: tuple[str, ...]
    edges: frozenset[str]
    largest_number: float
    _begins: tuple[str, ...]
    _ends: tuple[str, ...]

    @classmethod
    def of(cls, sought: Iterable[str], edges: Iterable[str], largest_number: float) -> Terms:
        texts = tuple(sorted(set(sought)))
        # a template may join texts before it searches them, so half of a searched text is enough
        begins = tuple(text[i:] for text in texts for i in range(1, len(text)))
        ends = tuple(text[:i] for text in texts for i in range(1, len(text)))
        return cls(texts, frozenset(edges), largest_number, begins, ends)

    def fit(self, text: str) -> bool:
        if not text or text[0].isspace() or text[-1].isspace() or text[0] in self.edges or text[-1] in self.edges:
            return False
        if text.startswith(self._begins) or text.endswith(self._ends):
            return False
        return not any(sought in text or text in sought for sought in self.sought)


class _Inspected(Exception):
    """The template inspects a text such that another text may be treated differently."""


class _Length(int):
    """The length of a stand-in; other texts share only that it is not 0."""


def _is_watched(value: Any) -> bool:
    """Whether a value contains text of a turn."""
    if isinstance(value, str):
        return _STAND_IN.search(value) is not None
    if isinstance(value, _Length):
        return True
    if value is None or isinstance(value, (int, float, jinja2.Undefined)) or callable(value):
        return False
    if isinstance(value, Mapping):
        return any(map(_is_watched, value)) or any(map(_is_watched, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_watched, value))
    return True


def _refuse_if(is_bad: bool) -> None:
    if is_bad:
        raise _Inspected


class _Watching(Sandbox):
    """An environment that records each operation on a stand-in."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    intercepted_unops = frozenset(["+", "-"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.finalize = _written
        self.forget()

    def forget(self) -> None:
        """Discard the record, so that the next rendering shows its own operations only."""
        self.sought: set[str] = set()
        self.edges: set[str] = set()
        self.largest_number = 0.0

    def watch(self) -> None:
        """Wrap filters and tests; to be called once all of them are registered."""
        own = {name: found for name, found in self.filters.items() if name.startswith(" ")}  # inspect nothing
        self.filters = {name: self._watch_filter(name, found) for name, found in self.filters.items()} | own
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _watch_test(name, found) for name, found in tests.items()}
        self._own: dict[str, Callable[..., Any]] = {
            "tunesmith_compare": self._compare, "tunesmith_slice": _slice, "tunesmith_each": _each,
            "tunesmith_concat": _concat, "tunesmith_number": self._number,
        }  # fmt: skip
        self.globals.update(self._own)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _refuse_if(_is_watched(argument) or (isinstance(argument, int) and isinstance(obj, str) and _is_watched(obj)))
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_watched(left) or _is_watched(right):
            is_join = isinstance(left, str) and isinstance(right, str)
            is_join |= isinstance(left, list) and isinstance(right, list)
            _refuse_if(operator != "+" or not is_join)
        if operator in ("*", "**"):
            self.largest_number = math.inf
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:
        _refuse_if(_is_watched(arg))
        return super().call_unop(context, operator, arg)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        is_free = (
            __obj in __self._own.values() or isinstance(__obj, Macro) or __obj in (Namespace, __self.globals["dict"])
        )
        if not is_free:
            named = {
                key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")
            }  # jinja2's own
            __self._watch_call(__obj, args, named)
        return super().call(__context, __obj, *args, **kwargs)

    def _watch_call(self, called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        of, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(of, str) and _is_watched(of):
            _refuse_if(bool(kwargs) or any(map(_is_watched, args)))
            if name in _STRIPS:
                self._see_edges(args)
            else:
                _refuse_if(name not in _LOOKS_FOR or not args)
                self._see_sought(args[0])
            return
        if not (any(map(_is_watched, args)) or any(map(_is_watched, kwargs.values()))):
            return
        is_join = isinstance(of, str) and name == "join" and _are_texts(args[0])
        _refuse_if(not is_join)

    def _number(self, value: float) -> float:
        self.largest_number = max(self.largest_number, abs(value))
        return value

    def _see_sought(self, texts: Any) -> None:
        for text in texts if isinstance(texts, tuple) else (texts,):
            _refuse_if(not isinstance(text, str) or text == "")
            self.sought.add(text)

    def _see_edges(self, args: Sequence[Any]) -> None:
        _refuse_if(len(args) > 1 or not all(isinstance(arg, (str, type(None))) for arg in args))
        self.edges.update(*(arg for arg in args if arg))

    def _compare(self, value: Any, *rest: Any) -> bool:
        for number in range(0, len(rest), 2):
            named, other = rest[number], rest[number + 1]
            if _is_watched(value) or _is_watched(other):
                self._watch_comparison(named, value, other)
            if not _COMPARES[named](value, other):
                return False
            value = other
        return True

    def _watch_comparison(self, named: str, left: Any, right: Any) -> None:
        if named in ("in", "notin"):
            _refuse_if(_is_watched(left))
            if isinstance(right, str):
                if left != "":
                    self._see_sought(left)
            else:
                _refuse_if(not isinstance(right, Mapping) and _holds_text(right))
            return
        watched, other = (left, right) if _is_watched(left) else (right, left)
        if isinstance(watched, _Length):
            _refuse_if(watched is right or isinstance(other, _Length) or (named, other) not in _EMPTY_OR_NOT)
            return
        _refuse_if(named not in ("eq", "ne") or _is_watched(other))
        if isinstance(other, str) and isinstance(watched, str) and other:
            self.sought.add(other)

    def _watch_filter(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(found)
        def watched(*given: Any, **kwargs: Any) -> Any:
            value, *args = given[1:] if hasattr(found, "jinja_pass_arg") else given
            beside = [*args, *kwargs.values()]
            if not _is_watched(value):
                _refuse_if(name not in ("default", "d") and any(map(_is_watched, beside)))
            elif isinstance(value, (str, _Length)):
                _refuse_if(isinstance(value, _Length) or any(map(_is_watched, beside)))
                if name in ("length", "count"):
                    return _Length(len(str(value)))
                self._watch_text_filter(name, args, kwargs)
            else:
                self._watch_list_filter(name, value, args, kwargs)
            return found(*given, **kwargs)

        return watched

    def _watch_text_filter(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name == "trim":
            self._see_edges([*args, *kwargs.values()])
        elif name == "replace":
            _refuse_if(not args)
            self._see_sought(args[0])
        else:
            _refuse_if(name not in ("string", "default", "d"))

    def _watch_list_filter(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        _refuse_if(any(map(_is_watched, [*args, *kwargs.values()])))
        if name in _BY_KEY:
            key = args[0] if args else kwargs.get("attribute")
            _refuse_if(not isinstance(key, str) or key == "content" or "." in key or (name == "map" and bool(args)))
        elif name == "join":
            _refuse_if(not _are_texts(value) or len(args) > 1 or bool(kwargs))
        else:
            _refuse_if(name not in _OF_LISTS)


def _watch_test(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(found)
    def watched(*given: Any, **kwargs: Any) -> Any:
        values = given[1:] if hasattr(found, "jinja_pass_arg") else given
        _refuse_if(name not in _TYPES and any(map(_is_watched, [*values, *kwargs.values()])))
        return found(*given, **kwargs)

    return watched


def _written(value: Any) -> Any:
    _refuse_if(not isinstance(value, str) and _is_watched(value))  # a list's repr depends on the characters in it
    return value


def _concat(*values: Any) -> str:
    return "".join(str(_written(value)) for value in values)


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    _refuse_if((isinstance(value, str) and _is_watched(value)) or any(map(_is_watched, (start, stop, step))))
    return value[slice(start, stop, step)]


def _each(value: Any) -> Any:
    _refuse_if(isinstance(value, str) and _is_watched(value))
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _holds_text(value: Any) -> bool:
    return not isinstance(value, (list, tuple)) or any(isinstance(item, str) and _is_watched(item) for item in value)


class _Instrument(NodeTransformer):
    """Replace operations that jinja2 compiles to plain Python by calls that can be recorded."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        rest = [part for op in node.ops for part in (nodes.Const(op.op, lineno=node.lineno), op.expr)]
        return _call("tunesmith_compare", [node.expr, *rest], node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        parts = [part or none for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("tunesmith_slice", [node.node, *parts], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("tunesmith_concat", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _call("tunesmith_each", [node.iter], node.lineno)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        is_number = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        return _call("tunesmith_number", [node], node.lineno) if is_number else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        _refuse_if(not isinstance(node.key, nodes.Const))  # equal texts as keys would become one key
        self.generic_visit(node)
        return node


def _call(name: str, args: list[Any], line: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load", lineno=line), args, [], None, None, lineno=line)


class Watcher:
    """A template's program with every operation recorded."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._made = build_environment(_Watching, GenerationTag)
        self._made.watch()
        self._program: jinja2.Template | None = None
        try:
            tree = _Instrument().visit(self._made.parse(renderer.template.text))
            self._program = self._made.from_string(tree)
        except (_Inspected, jinja2.TemplateError, RecursionError, SyntaxError):
            pass

    def find_terms(self, messages: Sequence[Message]) -> Terms | None:
        """Conditions under which the template treats texts like these stand-ins; None if it inspects them.

        Recorded for the finished chat, each reply at its end, and each prompt.
        """
        self._made.forget()
        try:
            is_alike = all(self._is_alike(messages, count) for count in range(1, len(messages) + 1))
        except (_Inspected, TemplateRefused):
            return None
        except MemoryError:
            raise
        except Exception:  # the recording program fails where the original does not: no conclusion
            return None
        if not is_alike:
            return None
        numbers = [
            float(value) for value in self._renderer.settings.variables.values() if isinstance(value, (int, float))
        ]
        return Terms.of(self._made.sought, self._made.edges, max([self._made.largest_number, *numbers]))

    def _is_alike(self, messages: Sequence[Message], count: int) -> bool:
        """Whether the recording program writes the first `count` messages as the original one does."""
        asks = messages[count - 1].role != "assistant"
        if self._program is None or (asks and (count == len(messages) or messages[count].role != "assistant")):
            return self._program is not None
        turns = self._renderer.to_turns(messages[:count])
        text, _ = run_template(self._program, {"messages": turns, **self._renderer.variables((), asks)})
        return text == self._renderer.render_turns(turns, (), asks)
