"""Text from outside as it may be shown: no control character on a terminal, no tag in a page, no mark in Markdown.

Rows, keys, file names, model replies and the errors of libraries are written by others. An escape sequence in them
could set the clipboard or rewrite lines that were printed before; a reversed line could show other words than it holds.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 without tab and line feed, DEL, C1, line separators, marks and overrides of direction, halves of a character; not
# U+200C and U+200D, which emoji and Indic words are joined by
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~#!$@]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=www)\.")


def visible(text: str) -> str:
    r"""The text with each control character as its number: \x1b, \u202e."""
    return _HIDDEN.sub(_number, text)


def one_line(text: str) -> str:
    r"""A name, or what holds one, for a line of its own: a line feed in it as \n, so that it adds no other line."""
    return visible(text).replace("\n", "\\n")


def _number(found: re.Match[str]) -> str:
    code = ord(found.group())
    return "\\r" if code == 13 else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shorten(text: str, length: int = 4000, line_length: int = 1000) -> str:
    """A message that may quote anything, at a length that a person reads: long lines lose their middle."""
    lines = [_cut_middle(line, line_length) for line in text.split("\n")]
    return _cut_middle("\n".join(lines), length)


def _cut_middle(text: str, length: int) -> str:
    half = length // 2 - 4
    return text if len(text) <= length else f"{text[:half]} [...] {text[-half:]}"


def to_html(text: str) -> str:
    """For a page, between tags or in quotes."""
    return html.escape(visible(text))


def to_markdown(text: str) -> str:
    """For one line of Markdown: shown as it stands, with no link, tag, image or heading of its own."""
    escaped = _MARKDOWN.sub(lambda found: "\\" + found.group(), visible(text))
    return re.sub(r"\s*\n\s*", " ", escaped.replace("&", "&amp;"))


class VisibleStream:
    """A text stream that never passes a control character on. rich writes its colours to `raw`, below it."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream below a VisibleStream, for what is known to be clean."""
    while isinstance(stream, VisibleStream):
        stream = stream.raw
    return stream


def cover_streams() -> None:
    """Make what is printed from now on visible."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, VisibleStream):
            setattr(sys, name, cast("TextIO", VisibleStream(stream)))


@contextmanager
def visible_streams() -> Iterator[None]:
    """Nothing that is printed meanwhile reaches the terminal as an escape sequence."""
    before = sys.stdout, sys.stderr
    cover_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def format_count(number: float) -> str:
    """1234567 -> "1.2M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def format_bytes(number: float) -> str:
    if number < 2**20:
        return f"{number / 2**10:.0f} KiB"
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
