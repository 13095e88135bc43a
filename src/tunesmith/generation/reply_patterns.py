"""Patterns that find the parts of a reply in its text, from the shapes of a template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex

from tunesmith.generation.reply_shapes import CallShape, ReplyShapes

_NAME = r"(?P<name>[\w.\-:/]+)"
_JSON_NAME = r'(?P<name>(?:[^"\\]|\\.)+)'
_PUNCTUATION = frozenset("{}[],:")
_BLANK = r"\s"
_BLANKS = 64  # white space before a marker; more of it is content, so that a search stays short


@dataclass(frozen=True, slots=True)
class Marker:
    """A text between parts.

    Attributes:
        pattern: its text, with white space before it.
        blanks: white space that the template writes behind it.
    """

    pattern: Any
    blanks: str


class ReplyPatterns:
    """The shapes of a model's replies, as patterns."""

    def __init__(self, shapes: ReplyShapes) -> None:
        self.begins_inside = shapes.begins_inside
        self.think_open = _marker(shapes.think_open) if shapes.think_open else None
        self.think_close = _marker(shapes.think_close) if shapes.think_close.strip() else None
        self.content_opens = [_marker(text) for text in shapes.content_opens if text.strip()]
        self.content_blanks = next((text for text in shapes.content_opens if not text.strip()), "")
        self.content_closes = [_marker(text) for text in shapes.content_closes]
        self.calls = CallPatterns(shapes.calls) if shapes.calls and _can_be_found(shapes.calls) else None


class CallPatterns:
    """Patterns of a template's tool calls; each "call" pattern ends with the first character of the arguments.

    Attributes:
        first: a call after content; `following`: after another call.
        first_object, following_object: the begin of a call that is a JSON object, whatever its keys' order.
        tail: after a call; `closing`: after the last one.
        depth: open brackets between the begin of the object and the arguments.
        entry: the begin of an argument, up to its value; `entry_end`: what follows a value.
    """

    def __init__(self, shape: CallShape) -> None:
        self.keys, self.path, self.depth = shape.keys, shape.path, len(shape.path) + 1
        self.entries = shape.entries
        marker = shape.head[: shape.head.index("{")] if shape.keys else shape.head
        opening = _loose(shape.opening)
        opening = f"(?:{opening})?" if marker.strip() and not shape.is_list else opening
        # a call without any text of its own before it can only begin a line
        is_bare = not (shape.opening + marker).strip(" \n\t[")
        lead = rf"(?:\s{{0,{_BLANKS}}}\n|(?<![^\n]))[ \t]{{0,{_BLANKS}}}" if is_bare else rf"\s{{0,{_BLANKS}}}"
        between = _loose(shape.between)
        again = rf"\s*(?:{between})?\s*{opening}" if marker.strip() else rf"\s*{between or opening}\s*"
        name = rf'"{_JSON_NAME}"' if shape.keys else _NAME
        head, middle = shape.head, shape.middle
        if shape.keys:  # without the quotes of the name
            head, middle = head.removesuffix('"'), middle.removeprefix('"')
        call = f"{_loose(head)}{name}{_loose(middle) if middle.strip() or not shape.entries else _BLANK}"
        call += "" if shape.entries else r"\s*(?P<arguments>\S)" if shape.keys else r"\s*(?P<arguments>\{)"
        self.first = self.following = None
        if shape.middle or not shape.keys:  # else the arguments come before the name
            self.first, self.following = _compile(lead + opening + call), _compile(again + call)
        self.first_object = self.following_object = None
        if shape.keys:
            start = _loose(marker) + r"\s*(?P<object>\{)"
            self.first_object = None if is_bare else _compile(lead + opening + start)
            self.following_object = _compile(again + start)
        self.tail = _compile(rf"\s*{_loose(shape.tail)}") if shape.tail.strip() else None
        self.closing = _compile(rf"\s*{_loose(shape.closing)}") if shape.closing.strip() else None
        if shape.entries:
            between = f"(?:{_loose(shape.entries.between)})?" if shape.entries.between.strip() else ""
            before, middle, after = _loose(shape.entries.before), shape.entries.middle, shape.entries.after
            begin = rf"\s*{between}\s*{before}(?P<key>[^\n]+?)\s*{_loose(middle.strip())}"
            self.entry = Marker(_compile(begin), middle[len(middle.rstrip()) :])
            blanks = "".join(f"{regex.escape(char)}?" for char in after[: len(after) - len(after.lstrip())])
            self.entry_end = _compile(f"{blanks}{_loose(after.strip())}")


def _can_be_found(shape: CallShape) -> bool:
    """Whether calls and arguments have texts that tell where they begin and end."""
    entries = shape.entries
    if entries and not (shape.middle and entries.middle.strip() and (entries.after.strip() or entries.quote)):
        return False
    return bool((shape.opening + shape.head).strip())


def _compile(pattern: str) -> Any:
    return regex.compile(pattern, regex.DOTALL)


def _loose(text: str) -> str:
    """A pattern for a text that allows other white space, and white space around JSON's punctuation."""
    words = regex.split(r"(\s+|[{}\[\],:])", text)
    return "".join(
        r"\s*" if word.isspace() else rf"\s*{regex.escape(word)}\s*" if word in _PUNCTUATION else regex.escape(word)
        for word in words
        if word
    )


def _marker(text: str) -> Marker:
    return Marker(_compile(rf"\s{{0,{_BLANKS}}}{_loose(text.strip())}"), text[len(text.rstrip()) :])
