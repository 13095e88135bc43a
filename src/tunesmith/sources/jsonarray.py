"""Read the items of a JSON array one after another, without holding the array in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from tunesmith.sources.jsontext import LongNumber, load_json_at
from tunesmith.sources.rowsize import BYTES_PER_MB, RowTooLarge, bound_row

_PIECE = 1 << 20  # characters that are read at once
_SPELLED = 8  # characters of a text that may stand for one byte of its value: \u0041, indentation
_MARGIN = 64  # characters at the end of what has been read, in which an error may come from too little text
_LONGEST_CUT = 2  # characters after a number that may belong to it, but only with the next one: 1e+5
_OF_NUMBERS = "0123456789+-.eE"
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # up to its end or to where the text stops
_MARK = re.compile(r'["\[{\]}]')
_MARK_OUTSIDE = re.compile(r'["\[{\]},]')  # outside of all brackets


class ArrayReader:
    """A text that is one JSON array.

    Args:
        text: opened, at its start.
        max_row_mb: a larger item is a RowTooLarge.
    """

    def __init__(self, text: IO[str], max_row_mb: float) -> None:
        self._text, self._max_row_mb = text, max_row_mb
        self._most = _SPELLED * int(max_row_mb * BYTES_PER_MB)  # characters of an item that is parsed
        self._buffer, self._at = "", 0
        self._line, self._column = 1, 0  # of the buffer's first character, from 1 and from 0
        self._has_ended = False

    def items(self) -> Iterator[Any]:
        """Every item in order.

        Raises:
            JSONDecodeError: with line and column in the whole text.
        """
        if self._next_mark() != "[":
            self._fail("", self._at)
        self._at += 1
        lead = "["  # with what may stand before the next item, for the error of an item that may not
        while not (self._next_mark() == "]" and lead == "["):
            yield self._read_item(lead)
            mark = self._next_mark()
            if mark == "]":
                break
            if mark != ",":
                self._fail('[""', self._at)
            self._at += 1
            lead = '["",'
        self._at += 1
        if self._next_mark():
            raise self._placed(json.JSONDecodeError("Extra data", self._buffer, self._at))

    def _next_mark(self) -> str:
        """Go to the next character that is not white space; "" at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read_more():
                return ""

    def _read_more(self, size: int = 0) -> bool:
        """Forget what has been passed, and read on; False at the end of the text."""
        passed = self._buffer[: self._at]
        if lines := passed.count("\n"):
            self._line += lines
            self._column = len(passed) - passed.rindex("\n") - 1
        else:
            self._column += len(passed)
        piece = "" if self._has_ended else self._text.read(max(size, _PIECE))
        self._has_ended = not piece
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)

    def _read_item(self, lead: str) -> Any:
        """The item that begins here; RowTooLarge where it is above the limit."""
        while True:
            try:
                value, end = load_json_at(self._buffer, self._at)
                if end + _LONGEST_CUT < len(self._buffer) or self._has_ended:
                    self._at = end
                    return bound_row(value, self._max_row_mb)
            except json.JSONDecodeError as error:
                if self._has_ended or not self._may_be_cut(error):
                    self._fail(lead, self._at)
            held = len(self._buffer) - self._at
            if held > self._most:
                return self._pass_over()
            self._read_more(held)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could make the item valid."""
        if error.pos >= len(self._buffer) - _MARGIN or error.msg.startswith("Unterminated string"):
            return True
        # an integer may not have so many digits, but with a fraction or an exponent after them it is a float
        return isinstance(error, LongNumber) and self._buffer[-1] in _OF_NUMBERS

    def _fail(self, lead: str, start: int) -> NoReturn:
        """Raise the decoder's error for the text from `start` on, behind the text `lead`."""
        try:
            load_json_at(lead + self._buffer[start:], 0)
        except json.JSONDecodeError as error:
            place = max(0, start + error.pos - len(lead))
            if error.pos < len(lead) and lead == '["",':  # at the comma before
                place = max(0, self._buffer.rfind(",", 0, start))
            raise self._placed(type(error)(error.msg, self._buffer, place)) from None
        raise self._placed(json.JSONDecodeError("Expecting value", self._buffer, start))

    def _placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """The error with line and column in the whole text."""
        error.colno += self._column if error.lineno == 1 else 0
        error.lineno += self._line - 1
        return error

    def _pass_over(self) -> RowTooLarge:
        """Go to the end of an item without holding it."""
        begins = self._placed(json.JSONDecodeError("the value that begins here has no end", self._buffer, self._at))
        depth, size, is_string = 0, 0, False
        while True:
            before = self._at
            depth, is_string, is_done = self._pass_piece(depth, is_string)
            size += self._at - before
            if is_done:
                return RowTooLarge(size // _SPELLED, self._max_row_mb)
            if not self._read_more():
                raise begins

    def _pass_piece(self, depth: int, is_string: bool) -> tuple[int, bool, bool]:
        """Go through what has been read; returns depth of brackets, whether a string is open, and whether it ended."""
        while self._at < len(self._buffer):
            if is_string:
                found = _STRING.match(self._buffer, self._at)
                self._at = found.end() if found else self._at
                if self._at == len(self._buffer) or self._buffer[self._at] == "\\":  # an escape is cut
                    return depth, True, False
                self._at += 1
                is_string = False
                if not depth:
                    return depth, False, True
                continue
            mark = (_MARK if depth else _MARK_OUTSIDE).search(self._buffer, self._at)
            if mark is None:
                self._at = len(self._buffer)
                break
            self._at = mark.end()
            is_string = mark.group() == '"'
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark.group(), 0)
            if mark.group() == "," or depth < 0:  # of the array itself
                self._at -= 1
                return 0, False, True
            if not depth and not is_string:
                return 0, False, True
        return depth, is_string, False
