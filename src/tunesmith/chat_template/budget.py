"""Limit what a chat template may compute and write for one chat.

Steps are counted instead of seconds, so that the same chat is accepted or refused on every machine. A step is one node
of the template's syntax tree. Once a template has built a large text, each step costs more, since any of them may scan
that text. All limits are far above what real templates need for the largest rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2.utils import Namespace

MAX_STEPS = 50_000_000  # a few seconds of Python; a chat of a thousand turns needs less than a million
MAX_TEXT = 32 * 2**20  # characters of one text, or 8 times the row's if that is more
MAX_MADE = 2**30  # characters of all texts built, or 256 times the row's
MAX_DEPTH = 100  # nested macro calls
_PER_NODE = 16  # characters that a number, or the marks around an item, count as
_FIRST_STEPS = 10_000  # after these, the row is measured
_LARGE = 16_384  # characters scanned in about the time of one step
MAX_NUMBER = 2**64  # of an integer; larger ones allow thousands of hash collisions
MAX_NESTING = 1000  # lists in lists; hashing deeper ones may overflow Python's stack
_MAX_BITS = 4096  # of a computed integer, before it is compared with MAX_NUMBER
_MAX_WIDTH = 100_000  # of a padded text
_MAX_GROUPS = 1_000_000
_MAX_DIGITS = 300
_MANY = 10_000  # values of one level; above this, the total is checked at each one
_MAX_DATE = 500  # characters of a date's format
VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")

Arguments = Sequence[Any]
Named = Mapping[str, Any]


class OverLimit(Exception):
    """The template computes or writes more than any chat needs."""


class Budget:
    """The remaining budget of one rendering.

    Attributes:
        left: remaining steps, at their current cost.
        depth: number of macros being called.
    """

    __slots__ = ("_given", "_is_measured", "_made", "_max_made", "_price", "_source", "depth", "left", "max_text")

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.left, self.depth, self.max_text = _FIRST_STEPS, 0, MAX_TEXT
        self._is_measured, self._price, self._made, self._max_made = False, 1, 0, MAX_MADE

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            self.refill()

    def refill(self) -> None:
        """Grant the remaining steps once; the second time the limit is reached."""
        if self._is_measured:
            raise OverLimit(
                f"the template takes more than {MAX_STEPS:,} steps for this chat; one of its loops or macros may be "
                "endless"
            )
        self._measure()
        self.spend(0)

    def _measure(self) -> None:
        self._is_measured = True
        self.left += (MAX_STEPS - _FIRST_STEPS) // self._price
        size, largest = measure(list(self._given.values()), None)
        self.max_text = max(MAX_TEXT, 8 * size)
        self._max_made = max(MAX_MADE, 256 * size)
        self._raise_price(largest)

    def _raise_price(self, size: int) -> None:
        price = 1 + size // _LARGE
        if price > self._price:
            self.left = self.left * self._price // price
            self._price = price

    def grow(self, size: int) -> None:
        """Count a text or list that was built."""
        self._made += size
        if size < _LARGE and self._made <= self._max_made:
            return
        self._raise_price(size)
        if size > self.max_text or self._made > self._max_made:
            if not self._is_measured:
                self._measure()
            self.require(size)
            if self._made > self._max_made:
                raise OverLimit(f"the template builds more than {self._max_made:,} characters in intermediate texts")

    def grow_items(self, count: int) -> None:
        """Count the items of a list that was built; each takes about the memory of a short text."""
        self._made += (_PER_NODE - 1) * count
        self.require(_PER_NODE * count)
        self.grow(count)

    def scan(self, text: str, shift: int) -> None:
        """Charge one step per 2**shift characters for one pass over a text; large ones raise the cost of a step."""
        self.spend(min(len(text), _LARGE) >> shift)

    def search(self, text: str, found: str) -> None:
        """Charge for a search that may compare `found` at each position of the text."""
        self.spend(len(text) * len(found) >> 10)

    def require(self, size: int) -> None:
        """Refuse a text of this many characters before it is built."""
        if size > self.max_text and not self._is_measured:
            self._measure()
        if size > self.max_text:
            raise OverLimit(f"the template builds a text of more than {self.max_text:,} characters")

    def weigh(self, value: Any) -> int:
        """Characters that a value takes when written; a list contained several times counts each time."""
        size, _ = measure([value], self)
        return size


def measure(values: list[Any], budget: Budget | None) -> tuple[int, int]:
    """Number of characters of all texts in these values, and of the largest.

    Args:
        budget: charged for the measurement, and limits it; if None, the values are known to be finite.
    """
    size = largest = count = depth = 0
    while values:
        depth += 1
        if depth > MAX_NESTING and budget is not None:
            raise OverLimit(f"the template nests lists more than {MAX_NESTING:,} deep")
        below: list[Any] = []
        size += _PER_NODE * len(values)
        for value in values:
            kind = type(value)
            count += 1
            if kind is str:
                size += len(value)
                if len(value) > largest:
                    largest = len(value)
            elif kind is dict:
                below += value
                below += value.values()
            elif kind is list:
                below += value
            elif value is not None and kind is not int and kind is not bool and kind is not float:
                if isinstance(value, str):  # marked as HTML
                    size += len(value)
                    largest = max(largest, len(value))
                else:
                    below += _parts(value, kind)
            if budget is not None and (len(below) > _MANY or not count % 1024):
                budget.require(size + _PER_NODE * len(below))
                if not count % 1024:
                    budget.spend(1024)
        values = below
    if budget is not None:
        budget.spend(count)
        budget.require(size)
    return size, largest


def _parts(value: Any, kind: type) -> Iterable[Any]:
    """Values that are written, compared or hashed along with this one."""
    parts: Iterable[Any] = ()
    if isinstance(value, (list, tuple)) or kind in VIEWS:
        parts = value
    elif kind is Namespace:
        parts = [object.__getattribute__(value, "_Namespace__attrs")]
    elif hasattr(kind, "unwatched"):  # WatchedMessages
        parts = value.unwatched()
    return parts


def require_small(value: Any) -> None:
    """Refuse a list or tuple of more than 1,000 values as a dict key."""
    values = [value]
    for _ in range(1000):
        if not values:
            return
        item = values.pop()
        if isinstance(item, (list, tuple)):
            values += item
    raise OverLimit("the template uses a list of more than 1,000 parts as a key")


def _argument(args: Arguments, named: Named, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else named.get(name, default)


def _require_at_most(value: Any, largest: int, what: str) -> None:
    if isinstance(value, (int, float)) and abs(value) > largest:
        raise OverLimit(f"the template asks for {what} of more than {largest:,}")


def _guard_width(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    _require_at_most(_argument(args, named, 0, "width", 80), _MAX_WIDTH, "a width")


def _guard_tabs(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    width = _argument(args, named, 0, "tabsize", 8)
    _require_at_most(width, _MAX_WIDTH, "a width")
    if isinstance(width, int):
        budget.require(len(value) + str(value).count("\t") * max(0, width))


def _guard_indent(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    width = _argument(args, named, 0, "width", 4)
    _require_at_most(width, _MAX_WIDTH, "a width")
    each = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    text = str(value)
    budget.require(len(text) + len(text.splitlines()) * max(0, each))


def _guard_replace(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    old, new = str(_argument(args, named, 0, "old", "")), str(_argument(args, named, 1, "new", ""))
    text = str(value)
    budget.search(text, old)
    if len(new) > len(old):
        budget.require(len(text) + text.count(old) * (len(new) - len(old)))


def _guard_digits(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    _require_at_most(_argument(args, named, 0, "precision", 0), _MAX_DIGITS, "a precision")


def _guard_batch(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    count = _argument(args, named, 0, "linecount", 0)
    _require_at_most(count, _MAX_GROUPS, "a number of groups")
    if _argument(args, named, 1, "fill_with", None) is not None and isinstance(count, int):
        budget.grow_items(max(0, count))  # the last group is padded


def _guard_slice(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    count = _argument(args, named, 0, "slices", 0)
    _require_at_most(count, _MAX_GROUPS, "a number of groups")
    if isinstance(count, int):
        budget.spend(max(0, count))
        budget.grow_items(4 * max(0, count))  # one list per group


def _guard_characters(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    if isinstance(value, str):
        budget.require(_PER_NODE * len(value))


def _guard_strip(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    chars = _argument(args, named, 0, "chars", None)
    if isinstance(chars, str) and isinstance(value, str):
        budget.search(value, chars)  # each character is looked up in `chars`


def _guard_search(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    looked_for = _argument(args, named, 0, "sep", None)
    if isinstance(looked_for, str) and isinstance(value, str):
        budget.search(value, looked_for)


def _guard_split(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    _guard_search(budget, value, args, named)
    separator = _argument(args, named, 0, "sep", None)
    most = value.count(separator) if isinstance(separator, str) and separator else len(value) // 2
    budget.spend(min(most, _LARGE))
    budget.require(_PER_NODE * most)


def _guard_url(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    budget.require(12 * budget.weigh(value))  # %F0%9D%84%9E for one character


def _guard_json(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    indent = _argument(args, named, 1, "indent", None)
    separators = _argument(args, named, 2, "separators", None)
    width = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    sizes = [width, *(len(text) for text in separators or () if isinstance(text, str))]
    _require_at_most(max(sizes), 64, "an indent or separator")


def _guard_tags(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    text = str(value)
    budget.spend(text.count("<") * len(text) // 1024)  # each removal copies the whole text


def guard_percent(budget: Budget, value: Any, args: Any) -> None:
    """Limit formatting such as '%1000000000s' % x, or '%(x)s%(x)s...' of a large x."""
    given = list(args.values()) if isinstance(args, Mapping) else list(args) if isinstance(args, tuple) else [args]
    sizes = [budget.weigh(item) for item in given] or [0]
    budget.spend(16 * str(value).count("%"))
    widths = [width for found in _PERCENT.findall(str(value)) for width in found if width]
    if "*" in widths:
        raise OverLimit("the template formats a text with a computed width (%*d)")
    for width in widths:
        _require_at_most(int(width) if len(width) < 10 else _MAX_WIDTH + 1, _MAX_WIDTH, "a width")
    repeats = str(value).count("%") if isinstance(args, Mapping) else 1
    budget.require(len(value) + sum(map(int, widths)) + repeats * sum(sizes))


def _guard_format(budget: Budget, value: Any, args: Arguments, named: Named) -> None:
    guard_percent(budget, value, dict(named) if named else tuple(args))


def guard_spec(spec: str) -> None:
    """Limit the widths in a format specification such as '{:>1000000000}'."""
    for number in re.findall(r"\d+", spec):
        _require_at_most(int(number) if len(number) < 10 else _MAX_WIDTH + 1, _MAX_WIDTH, "a width")


Guard = Callable[[Budget, Any, Arguments, Named], None]
GROWING_METHODS: Mapping[str, Guard] = {
    "center": _guard_width, "ljust": _guard_width, "rjust": _guard_width, "zfill": _guard_width,
    "expandtabs": _guard_tabs, "replace": _guard_replace, "split": _guard_split, "rsplit": _guard_split,
    "splitlines": _guard_split, "strip": _guard_strip, "lstrip": _guard_strip, "rstrip": _guard_strip,
    "count": _guard_search, "find": _guard_search, "index": _guard_search, "rfind": _guard_search,
    "rindex": _guard_search, "partition": _guard_search, "rpartition": _guard_search,
}  # fmt: skip
"""Text methods whose result may be far larger than the text, or that may take far longer than one pass over it."""


GROWING_FILTERS: Mapping[str, Guard] = {
    "center": _guard_width, "indent": _guard_indent, "replace": _guard_replace, "round": _guard_digits,
    "batch": _guard_batch, "slice": _guard_slice, "tojson": _guard_json, "format": _guard_format,
    "striptags": _guard_tags, "trim": _guard_strip, "list": _guard_characters, "urlencode": _guard_url,
}  # fmt: skip


def guard_product(budget: Budget, left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(other, int):
            budget.require(len(one) * max(0, other) * (1 if isinstance(one, str) else _PER_NODE))
            return
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        require_number(MAX_NUMBER)


def guard_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(0, right) > _MAX_BITS:
        require_number(MAX_NUMBER)


def require_number(value: int) -> None:
    """Refuse a computed integer that is larger than any template needs."""
    if not -MAX_NUMBER < value < MAX_NUMBER:
        raise OverLimit("the template computes an integer of more than 64 bits")


def require_date_format(text: Any) -> None:
    """Refuse a date format that is far longer than any date."""
    if isinstance(text, str) and len(text) > _MAX_DATE:
        raise OverLimit(f"the template uses a date format of more than {_MAX_DATE} characters")
