"""Compile and run chat templates with filters and tests whose cost is bounded."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeVar

import jinja2
import jinja2.ext
from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.utils import _PassArg

from tunesmith.chat_template.budget import GROWING_FILTERS, require_date_format
from tunesmith.chat_template.sandbox import (
    CLOSE,
    EACH,
    OPEN,
    SCALARS,
    SIZED,
    SPEND,
    TURN,
    BoundedContext,
    DictHelper,
    Helper,
    Sandbox,
)  # fmt: skip
from tunesmith.errors import ModelError

MAX_SOURCE = 1_000_000  # characters of a template; the largest known one has 20,000
_SHALLOW = frozenset({
    "list", "length", "count", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "items",
    "reverse", "default", "d", "batch", "slice", "attr",
})  # fmt: skip
"""Filters that never look into the items of a list."""
_COMPARING = frozenset({
    "eq", "equalto", "==", "ne", "!=", "gt", "greaterthan", ">", "ge", ">=", "lt", "lessthan", "<", "le", "<=", "in",
    "divisibleby", "sameas",
})  # fmt: skip
_SORTING = frozenset({"sort", "dictsort", "unique", "groupby", "min", "max"})
_QUICK = frozenset({
    "default", "d", "first", "last", "length", "count", "string", "safe", "attr", "list", "int", "float",
})  # fmt: skip
_SLOW = frozenset({"title", "wordcount", "striptags", "urlencode", "forceescape", "indent", "capitalize", "truncate"})
"""Filters that do not scan a text, and those that scan it in Python."""
_REFUSED_FILTERS = {
    "random": "the same row would be rendered differently each time",
    "pprint": "its time grows with the square of a text's length; use tojson(indent=2)",
    "urlize": "its time grows with the square of a text's length",
    "wordwrap": "its time grows with the square of a text's length",
}
Made = TypeVar("Made", bound=Sandbox)


@pass_context
def _each(context: BoundedContext, value: Any, price: int) -> Any:
    return context.each(value, price)


@pass_context
def _spend(context: BoundedContext, price: int) -> None:
    context.budget.spend(price)


def _tell(event: str) -> Callable[..., Any]:
    @pass_context
    def tell(context: BoundedContext, value: Any) -> None:
        if context.watcher is not None:
            context.watcher(event, value)

    return tell


@pass_context
def _join(context: BoundedContext, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = context.each(value, 4)
    if attribute is not None:
        items = map(make_attrgetter(context.environment, attribute), items)
    return context.join_by(context.text(d), [context.text(item) for item in items])


@pass_context
def _sum(context: BoundedContext, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    items = context.each(iterable, 4)
    if attribute is not None:
        items = map(make_attrgetter(context.environment, attribute), items)
    for item in items:
        start = context.add(start, item)
    return start


def _refuse_filter(name: str, reason: str) -> Callable[..., Any]:
    @pass_context
    def refused(context: BoundedContext, *args: Any, **named: Any) -> Any:
        raise SecurityError(f"the filter {name} of jinja2 is not available to chat templates: {reason}")

    return refused


def dated(date: datetime.datetime) -> Helper:
    """The strftime_now function of chat templates for a date."""

    def write(format: str) -> str:  # `format` is the argument's name in transformers
        require_date_format(format)
        return date.strftime(_DIRECTIVE.sub(lambda found: _spell_in_english(date, found), format))

    return Helper("strftime_now", write)


_DIRECTIVE = re.compile(r"%([-_0^#]*)(\d*)(E(?=[cCxXyY])|O(?=[bBdeghHIkljmMprRSTuUVwWyzZ])|)(.)", re.DOTALL)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_SPELLED: Mapping[str, Callable[[datetime.datetime], str]] = {
    "a": lambda date: _DAYS[date.weekday()][:3],
    "A": lambda date: _DAYS[date.weekday()],
    "b": lambda date: _MONTHS[date.month - 1][:3],
    "h": lambda date: _MONTHS[date.month - 1][:3],
    "B": lambda date: _MONTHS[date.month - 1],
    "p": lambda date: "AM" if date.hour < 12 else "PM",
    "P": lambda date: "am" if date.hour < 12 else "pm",
    "c": lambda date: date.ctime(),
    "r": lambda date: f"{(date.hour - 1) % 12 + 1:02}:{date:%M:%S} {'AM' if date.hour < 12 else 'PM'}",
    "x": lambda date: f"{date:%m/%d/%y}",
    "X": lambda date: f"{date:%H:%M:%S}",
}
"""What strftime would write in the language of the caller's locale, which a worker process does not share."""


def _spell_in_english(date: datetime.datetime, found: re.Match[str]) -> str:
    """A directive of strftime with what depends on the locale written out; flags and width as in the C library."""
    flags, width, _, letter = found.groups()  # E and O ask for a calendar and for digits of the locale
    if letter not in _SPELLED:
        return f"%{flags}{width}{letter}"
    text = _SPELLED[letter](date)
    if "#" in flags and letter == "p":
        text = text.lower()
    elif letter != "P" and ("^" in flags or ("#" in flags and letter != "c")):
        text = text.upper()
    fill = "0" if re.sub(r"[^-_0]", "", flags)[-1:] == "0" else " "
    return text.rjust(min(int(width or 0), 500), fill)


def _bound_filter(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
    passed = _PassArg.from_obj(found)
    guard = GROWING_FILTERS.get(name)
    is_shallow, is_sorting, is_quick = name in _SHALLOW, name in _SORTING, name in _QUICK
    shift = 0 if name in _SLOW else 7

    @pass_context
    def bounded(context: BoundedContext, value: Any, *args: Any, **named: Any) -> Any:
        if type(value) is str:
            if len(value) > 256 and not is_quick:
                context.budget.scan(value, shift)
        elif type(value) not in SCALARS:
            if not is_shallow:
                size = context.budget.weigh(value)
                if is_sorting:
                    context.budget.spend((size >> 6) + 16 * (len(value) if isinstance(value, SIZED) else 0))
            elif isinstance(value, SIZED):
                context.budget.spend(len(value))
        for given in args:
            context.plain(given)
        for given in named.values():
            context.plain(given)
        if guard:
            guard(context.budget, value, args, named)
        first = _passed(context, passed)
        made = found(*first, value, *args, **named)
        if isinstance(made, Iterator):
            return context.pay(made, 10)
        return context.calculated(made) if name == "int" else context.counted(made)

    return bounded


def _bound_test(found: Callable[..., Any]) -> Callable[..., Any]:
    passed = _PassArg.from_obj(found)

    @pass_context
    def bounded(context: BoundedContext, value: Any, *args: Any) -> Any:
        if args:  # a comparison
            context.plain(value)
            for given in args:
                context.plain(given)
        return found(*_passed(context, passed), value, *args)

    return bounded


def _passed(context: BoundedContext, wanted: _PassArg | None) -> tuple[Any, ...]:
    if wanted is None:
        return ()
    if wanted is _PassArg.context:
        return (context,)
    return (context.eval_ctx,) if wanted is _PassArg.eval_context else (context.environment,)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _lipsum(*args: Any, **named: Any) -> None:
    raise SecurityError("lipsum of jinja2 is not available to chat templates: it writes random words")


def build_environment(kind: type[Made], *extensions: type[jinja2.ext.Extension]) -> Made:
    """A jinja2 environment in which untrusted templates may run."""
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=[*extensions, jinja2.ext.loopcontrols])
    found: dict[str, Callable[..., Any]] = {**made.filters, "tojson": _to_json}
    made.filters = {name: _bound_filter(name, function) for name, function in found.items()}
    made.filters |= {name: _refuse_filter(name, reason) for name, reason in _REFUSED_FILTERS.items()}
    made.filters |= {"join": _join, "sum": _sum, EACH: _each, SPEND: _spend}
    made.filters |= {event: _tell(event) for event in (TURN, OPEN, CLOSE)}
    tests: Mapping[str, Any] = made.tests
    made.tests = {name: _bound_test(function) if name in _COMPARING else function for name, function in tests.items()}
    made.globals["lipsum"] = Helper("lipsum", _lipsum)
    made.globals["dict"] = DictHelper()
    made.globals["raise_exception"] = Helper("raise_exception", _raise_exception)
    return made


@lru_cache(maxsize=64)
def _globals_of(program: jinja2.Template) -> dict[str, Any]:
    """Functions of the environment, which jinja2 keeps in a chain of mappings that it copies for each rendering."""
    return dict(program.globals)


def run_template(
    program: jinja2.Template,
    variables: Mapping[str, Any],
    watch: Callable[[str, Any, int], None] | None = None,
) -> tuple[str, list[int]]:
    """The text that a program writes, and its length after each piece.

    Args:
        watch: called with an event of the program, its value, and the number of pieces written before it.
    """
    context = BoundedContext(
        program.environment, {**_globals_of(program), **variables}, program.name, program.blocks, _globals_of(program)
    )
    if watch is None:
        return context.concat(program.root_render_func(context)), []
    pieces = [""]
    context.watcher = lambda event, value: watch(event, value, len(pieces))
    for piece in program.root_render_func(context):
        pieces.append(piece)  # `watch` reads its length in between
    return context.concat(pieces), list(accumulate(map(len, pieces)))


def compile_program(source: str, make: Callable[[str], jinja2.Template], name: str) -> jinja2.Template:
    """Compile a template's source.

    Args:
        make: parses and compiles the source.
        name: of the template, for errors.

    Raises:
        ModelError: it cannot be compiled.
    """
    advice = "Correct the template or name another one with --data.chat_template."
    if len(source) > MAX_SOURCE:
        raise ModelError(
            f"chat template {name}: has {len(source):,} characters; the limit is {MAX_SOURCE:,}. {advice}",
            code="template-too-long",
        )
    try:
        return make(source)
    except jinja2.TemplateSyntaxError as error:
        reason = cut(str(error.message)).rstrip(".")
        raise ModelError(
            f"chat template {name}, line {error.lineno}: {reason}. {advice}", code="template-syntax"
        ) from None
    except (RecursionError, MemoryError, SyntaxError, SystemError):
        raise ModelError(
            f"chat template {name}: its blocks or expressions are nested too deeply to be compiled. {advice}",
            code="template-too-deep",
        ) from None
    except (ValueError, OverflowError, TypeError, AssertionError) as error:
        raise ModelError(
            f"chat template {name}: cannot be compiled: {cut(str(error))}. {advice}", code="template-not-compiled"
        ) from None


def cut(text: str, length: int = 500) -> str:
    """Shorten a text that comes from a template or row for a message."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."
