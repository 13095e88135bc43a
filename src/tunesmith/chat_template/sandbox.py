"""Run chat templates in a sandbox: a template from the hub is untrusted code.

Three restrictions on top of jinja2's own sandbox:
- A template can access only the attributes listed here, only on values that are data, and can call only the functions
  that it is given. jinja2 blocks names that begin with an underscore instead, which must cover every way around that.
- Loops, macros, calls and all operations whose result may be large are counted (budget.py).
- Random filters, and filters whose time grows with the square of a text's length, are not available; no known chat
  template uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import _GroupTuple
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import EscapeFormatter, Markup

from tunesmith.chat_template.budget import (
    GROWING_METHODS,
    MAX_DEPTH,
    MAX_NUMBER,
    VIEWS,
    Budget,
    OverLimit,
    guard_percent,
    guard_power,
    guard_product,
    guard_spec,
    require_number,
    require_small,
)  # fmt: skip
from tunesmith.chat_template.sandbox_compiler import SHORT, BoundedCompiler

_COUNTED = 256  # shorter texts are not counted
_LONG_LOOP = 100_000  # steps
SCALARS = frozenset({str, int, float, bool, type(None)})
SIZED: tuple[type[Any], ...] = (list, tuple, dict, str, range, *VIEWS)

_OF_TEXT = frozenset(name for name in dir(str) if name[0] != "_") - {"encode", "translate", "maketrans"}
_OF_LIST, _OF_DICT = frozenset({"index", "count", "copy"}), frozenset({"get", "items", "keys", "values", "copy"})
_ATTRIBUTES: Mapping[type, frozenset[str]] = {
    list: _OF_LIST,
    tuple: _OF_LIST,
    range: _OF_LIST,
    _GroupTuple: _OF_LIST | {"grouper", "list"},
    int: frozenset({"bit_length", "real", "imag"}),
    bool: frozenset({"bit_length", "real", "imag"}),
    float: frozenset({"is_integer", "real", "imag"}),
    LoopContext: frozenset({
        "index", "index0", "first", "last", "length", "previtem", "nextitem", "revindex", "revindex0", "depth",
        "depth0", "cycle", "changed",
    }),
    Cycler: frozenset({"next", "current", "reset"}),
    Macro: frozenset({"name", "arguments", "catch_kwargs", "catch_varargs", "caller"}),
    BlockReference: frozenset({"super"}),
}  # fmt: skip
_SLOW = frozenset({"swapcase", "title", "capitalize", "casefold", "istitle", "islower", "isupper", "isprintable"})
_INSTANT = frozenset({"startswith", "endswith", "removeprefix", "removesuffix"})
"""Methods that scan a text one character at a time, and methods that do not scan it."""
_CALLED = (Macro, LoopContext, Joiner, BlockReference, MethodType)


class Helper:
    """A function that templates may call; it exposes none of the attributes of a Python function."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<function {self._name}>"


Helper.__module__, Helper.__name__ = "builtins", "function"  # the names that jinja2's messages show


class DictHelper(Helper):
    """`dict` without the methods that change a message passed to it: dict.update(message, ...)."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("dict", dict)

    @property
    def fromkeys(self) -> Helper:
        return Helper("fromkeys", dict.fromkeys)


DictHelper.__module__, DictHelper.__name__ = "builtins", "function"
_EXPOSED = {**_ATTRIBUTES, DictHelper: frozenset({"fromkeys"})}


class _FormatHelper(Helper):
    """The `format` method of a text; called with the budget as first argument."""

    __slots__ = ()


class _Refused(jinja2.StrictUndefined):
    """An attribute that templates cannot access: undefined, and an error when used."""

    __slots__ = ()


class BoundedContext(Context):
    """Variables and budget of one rendering. Compiled templates call these methods by the names in `_NAMES`.

    Attributes:
        watcher: called as `watcher(event, value)` for each event of the program.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = Budget(self.parent)
        self.watcher: Callable[[str, Any], None] | None = None

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        made = super().derived(locals)
        assert isinstance(made, BoundedContext)
        made.budget, made.watcher = self.budget, self.watcher
        return made

    def add(self, left: Any, right: Any) -> Any:
        made = left + right
        if type(made) is str:
            if len(made) > _COUNTED:
                self.budget.grow(len(made))
            return made
        return self.calculated(made)

    def subtract(self, left: Any, right: Any) -> Any:
        return self.calculated(left - right)

    def calculated(self, made: Any) -> Any:
        """A number computed by a template, which must be small; numbers in a row may be large."""
        if isinstance(made, int):
            if not -MAX_NUMBER < made < MAX_NUMBER:
                require_number(made)
            return made
        return self.counted(made)

    def counted(self, made: Any) -> Any:
        if isinstance(made, (str, list, tuple, dict)) and len(made) > (_COUNTED if isinstance(made, str) else 16):
            if isinstance(made, str):
                self.budget.grow(len(made))
            else:
                self.budget.grow_items(len(made) * (8 if isinstance(made, dict) else 1))
        return made

    def contains(self, item: Any, holder: Any) -> bool:
        """`item in holder`, charged to the budget."""
        if type(item) not in SCALARS:
            self.budget.weigh(item)
            self.budget.weigh(holder)
        elif isinstance(holder, str):
            if isinstance(item, str) and len(item) > SHORT:
                self.budget.search(holder, item)
        elif type(holder) is not dict and isinstance(holder, SIZED):
            self.budget.spend(len(holder))
        return item in holder

    def within(self, holder: Any) -> Any:
        """The container of an `in` test whose item is not evaluated yet."""
        if isinstance(holder, str):
            self.budget.search(holder, holder)
        return self.plain(holder)

    def text(self, value: Any) -> str:
        """`str(value)`; the size of a list is checked first."""
        return value if type(value) is str else str(self.plain(value))

    def plain(self, value: Any) -> Any:
        """A value that may safely be compared, hashed and written."""
        if type(value) not in SCALARS:
            self.budget.weigh(value)
        return value

    def join(self, values: Sequence[Any]) -> str:
        return self.concat([self.text(value) for value in values])

    def join_by(self, separator: str, texts: list[Any]) -> str:
        size = sum(len(text) for text in texts if isinstance(text, str)) + len(separator) * len(texts)
        self.budget.require(size)
        return separator.join(texts)

    def each(self, value: Any, price: int) -> Any:
        """What a loop iterates over. Cheap loops are charged at once, others per item, as a loop may break."""
        count = len(value) if isinstance(value, SIZED) else value.total if hasattr(type(value), "unwatched") else None
        if count is not None and count * price < _LONG_LOOP:
            self.budget.spend(count * price)
            return value
        return self.pay(value, price)

    def pay(self, value: Iterable[Any], price: int) -> Iterator[Any]:
        budget = self.budget
        for item in value:
            budget.left -= price
            if budget.left < 0:
                budget.refill()
            yield item

    def concat(self, texts: Iterable[str]) -> str:
        texts = list(texts)
        size = sum(map(len, texts))
        if size > _COUNTED:
            self.budget.require(size)
            self.budget.grow(size)
        return "".join(texts)


class _Formatter(SandboxedFormatter):
    """str.format with bounded widths."""

    def __init__(self, sandbox: Sandbox, budget: Budget, **options: Any) -> None:
        super().__init__(sandbox, **options)
        self._budget, self._size = budget, 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.weigh(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        guard_spec(format_spec)
        self._budget.spend(50)
        self._budget.weigh(value)
        made = super().format_field(value, format_spec)
        self._size += len(made)
        self._budget.require(self._size)
        return made


class _EscapeFormatter(_Formatter, EscapeFormatter):
    """The same for a text marked as HTML."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a list of allowed attributes instead of a list of forbidden ones."""

    code_generator_class = BoundedCompiler
    context_class = BoundedContext
    intercepted_binops = frozenset(["*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            price = nodes.Const(_count_nodes(loop.body))
            loop.iter = nodes.Filter(loop.iter, EACH, [price], [], None, None, lineno=loop.lineno)
        for const in source.find_all(nodes.Const):
            if isinstance(const.value, int) and abs(const.value) >= MAX_NUMBER:
                raise jinja2.TemplateSyntaxError("a number of more than 64 bits", const.lineno)
        for kind in (nodes.Macro, nodes.CallBlock, nodes.Block):
            for part in source.find_all(kind):
                body: list[nodes.Node] = part.body  # type: ignore[attr-defined]  # all three kinds have a body
                body.insert(0, call_internal(SPEND, [nodes.Const(_count_nodes(body))], part.lineno))
        for node in source.find_all(nodes.Node):
            node.environment = self
        return super()._generate(source, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:  # fast path for `message.role`
            if attribute in obj and not hasattr(dict, attribute):
                return obj[attribute]
            if attribute in _OF_DICT:
                return getattr(obj, attribute)
        elif kind is str and attribute in _OF_TEXT and attribute not in ("format", "format_map"):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) not in SCALARS:  # it will be hashed or compared
            require_small(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        if isinstance(obj, str):
            return attr in _OF_TEXT
        if isinstance(obj, Mapping):
            return attr in _OF_DICT
        if isinstance(obj, (Namespace, jinja2.Undefined)):
            return True
        allowed = _EXPOSED.get(type(obj))
        return attr in (_OF_LIST if allowed is None and isinstance(obj, Sequence) else allowed or ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raise an error at once where jinja2's own sandbox gives a value; empty text would be wrong there."""
        if hasattr(type(obj), "unwatched") and not hasattr(list, attribute):
            return self.undefined(obj=obj, name=attribute)  # WatchedMessages has only the attributes of a list
        reason = f"{attribute!r} of a value of type {type(obj).__name__} is not accessible to chat templates"
        if super().is_safe_attribute(obj, attribute, None):
            raise SecurityError(reason)
        return _Refused(reason, name=attribute, exc=SecurityError)

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, (*_CALLED, BuiltinMethodType, Helper, jinja2.Undefined)):
            return True  # methods come from `getattr` only, which returns listed ones only
        if isinstance(obj, (type, FunctionType)):
            return any(obj is given for given in self.globals.values())
        return not callable(obj)  # calling it raises the proper error

    def wrap_str_format(self, value: Any) -> Helper | None:
        if not isinstance(value, (MethodType, BuiltinMethodType)) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        if not isinstance(text, str):
            return None
        is_mapping, kind = value.__name__ == "format_map", type(text)

        def run(budget: Budget, *args: Any, **named: Any) -> str:
            budget.scan(text, 4)
            if isinstance(text, Markup):
                formatter: _Formatter = _EscapeFormatter(self, budget, escape=text.escape)
            else:
                formatter = _Formatter(self, budget)
            return kind(formatter.vformat(text, (), *args) if is_mapping else formatter.vformat(text, args, named))

        return _FormatHelper(value.__name__, run)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = __context.budget
        budget.spend(10 + len(args))
        if isinstance(__obj, BuiltinMethodType):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __context.counted(_call_method(__context, __obj, args, kwargs))
        if isinstance(__obj, Helper):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            for given in (*args, *kwargs.values()):
                __context.plain(given)
            if isinstance(__obj, _FormatHelper):
                args = (budget, *args)
            return __context.counted(__obj(*args, **kwargs))
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"{type(__obj).__name__} is not safely callable")
        if isinstance(__obj, LoopContext) and args:  # a recursive loop
            args = (__context.each(args[0], 100), *args[1:])
        if isinstance(__obj, (type, MethodType)):  # they hash or compare their arguments
            for given in args:
                __context.plain(given)
        budget.spend(100)  # about the cost of jinja2's own macro call
        if budget.depth >= MAX_DEPTH:
            raise OverLimit(f"the template's macro calls are nested more than {MAX_DEPTH} deep")
        budget.depth += 1
        try:
            return __context.counted(__context.call(__obj, *args, **kwargs))
        finally:
            budget.depth -= 1

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = context.budget
        if operator == "*":
            guard_product(budget, left, right)
        elif operator == "**":
            guard_power(left, right)
        elif operator == "%" and isinstance(left, str):
            guard_percent(budget, left, right)
        return context.calculated(super().call_binop(context, operator, left, right))


def _call_method(context: BoundedContext, method: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a method of a text, list or dict."""
    of, name = method.__self__, method.__name__
    budget = context.budget
    if args and type(args[0]) not in SCALARS:
        budget.weigh(args)
        if not isinstance(of, (str, dict)):
            budget.weigh(of)  # it is compared with each item
    if isinstance(of, str):
        if name == "join" and len(args) == 1:
            return context.join_by(of, list(context.each(args[0], 1)))
        if len(of) > _COUNTED and name not in _INSTANT:
            budget.scan(of, 3 if name in _SLOW else 7)
        if guard := GROWING_METHODS.get(name):
            guard(budget, of, args, named)
            made = method(*args, **named)
            if isinstance(made, list):
                budget.grow_items(3 * len(made))  # each item is a new text
            return made
    elif name in ("count", "index", "copy"):
        budget.spend(len(of))
    return method(*args, **named)


def _count_nodes(body: Iterable[nodes.Node]) -> int:
    return 1 + sum(1 for part in body for _ in part.find_all(nodes.Node)) + sum(1 for _ in body)


def call_internal(name: str, arguments: list[nodes.Expr], line: int) -> nodes.ExprStmt:
    """A statement that calls an internal filter, under a name that no template can spell."""
    first = arguments[0] if arguments else nodes.Const(None)
    filtered = nodes.Filter(first, name, arguments[1:], [], None, None, lineno=line)
    return nodes.ExprStmt(filtered, lineno=line)


EACH, SPEND = " each", " spend"
TURN, OPEN, CLOSE = " turn", " open", " close"
"""Events passed to the watcher: a turn has been written; a {% generation %} block begins or ends."""
