"""Make outside text safe to show: no control characters on a terminal, no HTML tags in a page, no Markdown markup.

Rows, keys, file names, model replies and errors of libraries are outside text. An escape sequence in it could set the
clipboard or overwrite earlier lines; text with reversed direction could display other words than it contains.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 without tab and line feed, DEL, C1, line separators, direction marks and overrides, lone surrogates; not U+200C and
# U+200D, which join emoji and Indic words
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LEVEL_STYLES = {"error": "bold red", "warning": "yellow"}
"""Colours of errors and warnings on a terminal, by level."""
_ROWS = 4  # that a line names
_LONGEST_NAME = 24  # of a file in such a line
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~#!$@]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=www)\.")


def visible(text: str) -> str:
    r"""The text with control characters escaped: \x1b, \u202e."""
    return _HIDDEN.sub(_number, text)


def one_line(text: str) -> str:
    r"""Escape a text for a single line: control characters, and line feeds as \n."""
    return visible(text).replace("\n", "\\n")


def hidden_removed(text: str) -> str:
    """The text without control characters."""
    return _HIDDEN.sub("", text)


def hidden_replaced(text: str) -> str:
    """The text with U+FFFD for each control character: of the same length."""
    return _HIDDEN.sub("\ufffd", text)


def _number(found: re.Match[str]) -> str:
    code = ord(found.group())
    return "\\r" if code == 13 else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shorten(text: str, length: int = 4000, line_length: int = 1000) -> str:
    """Shorten a message that may quote long texts; long lines lose their middle."""
    lines = [_cut_middle(line, line_length) for line in text.split("\n")]
    return _cut_middle("\n".join(lines), length)


def _cut_middle(text: str, length: int) -> str:
    half = length // 2 - 4
    return text if len(text) <= length else f"{text[:half]} [...] {text[-half:]}"


def to_html(text: str) -> str:
    """Escape a text for an HTML page, between tags or in attribute quotes."""
    return html.escape(visible(text))


def to_markdown(text: str) -> str:
    """Escape a text for one line of Markdown: shown literally, without links, tags, images or headings."""
    escaped = _MARKDOWN.sub(lambda found: "\\" + found.group(), visible(text))
    return re.sub(r"\s*\n\s*", " ", escaped.replace("&", "&amp;"))


class VisibleStream:
    """A text stream that escapes control characters. rich writes its colours to `raw`, the stream below.

    Attributes:
        before_write: erases a line that the next output replaces (terminal/status.py), if there is one.
    """

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw
        self.before_write: Callable[[], None] | None = None

    def settle(self) -> None:
        """Erase a line that says what is being done."""
        if self.before_write is not None:
            self.before_write()

    def write(self, text: str) -> int:
        self.settle()
        self.raw.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream below a VisibleStream, for text that is known to be safe."""
    while isinstance(stream, VisibleStream):
        stream.settle()
        stream = stream.raw
    return stream


def cover_streams() -> None:
    """Escape control characters in everything printed from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, VisibleStream):
            setattr(sys, name, cast("TextIO", VisibleStream(stream)))


@contextmanager
def visible_streams() -> Iterator[None]:
    """Escape control characters in everything printed within the block."""
    before = sys.stdout, sys.stderr
    cover_streams()
    try:
        yield
    finally:
        if isinstance(sys.stdout, VisibleStream):
            sys.stdout.settle()
        sys.stdout, sys.stderr = before


def format_time(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_seconds(seconds: float) -> str:
    """0.084 -> "0.08 s", 94.2 -> "94 s", 250 -> "4 min"."""
    if seconds >= 100:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


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


def format_rows(rows: Sequence[str]) -> str:
    """The first of them as FILE:ROW; metrics.jsonl has all in full."""
    shown, last = [], ""
    for row in rows[:_ROWS]:
        file, _, number = row.rpartition(":")
        name = file.rpartition("/")[2]
        name = name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
        shown.append(number if name and name == last else f"{name}:{number}" if name else number)
        last = name
    more = f" and {len(rows) - _ROWS} more" if len(rows) > _ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(shown)}{more}"
