"""Keep working when standard input or output is closed, full, or no longer read.

`tunesmith train ... | head -1` continues training. A command whose purpose is to print ends instead.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class OutputLost(BaseException):
    """Standard output cannot be written in a command that prints. A BaseException: only `main` handles it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.error = error

    @property
    def has_reader_left(self) -> bool:
        return self.error.errno == errno.EPIPE


class Output(io.FileIO):
    """File 1 or 2; after a failed write, further output is discarded.

    Attributes:
        ends_without_reader: raise OutputLost when the reader has closed the pipe.
        ends_when_full: raise OutputLost when writing fails for another reason.
        failure: the first error.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.ends_without_reader = self.ends_when_full = False
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            # None: the pipe is full and non-blocking (O_NONBLOCK), as set by node and some CI systems
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            lost = os.open(os.devnull, os.O_WRONLY)
            os.dup2(lost, self.fileno())
            os.close(lost)
            if self.failure is None:
                self.failure = error
                has_left = error.errno == errno.EPIPE
                if self.ends_without_reader if has_left else self.ends_when_full:
                    raise OutputLost(error) from None
                if self.fileno() == 1:
                    reason = "closed by its reader" if has_left else error.strerror
                    print(f"note: standard output: {reason}; continuing without it", file=sys.stderr)
            return len(data)


class Input(io.FileIO):
    """File 0 if it is non-blocking: reading waits for text."""

    def readinto(self, buffer: object) -> int:
        while (size := super().readinto(buffer)) is None:  # type: ignore[arg-type]
            select.select([self], [], [])
        return size


@contextlib.contextmanager
def lasting_streams() -> Iterator[Output]:
    """Use Output for sys.stdout and sys.stderr; yields that of stdout.

    Streams that are not files 1 and 2 (in a notebook, in a test) stay as they are.
    """
    _open_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    stdout, stderr = Output(1), Output(2)
    sys.stdin = _waiting_stdin()
    sys.stdout, sys.stderr = _over(stdout, sys.stdout), _over(stderr, sys.stderr)
    try:
        yield stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OutputLost, OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _waiting_stdin() -> io.TextIOWrapper:
    stream = sys.stdin
    if stream is None:
        return open(0, encoding="utf-8", closefd=False)  # stays open
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if os.name == "nt" or not (isinstance(raw, io.FileIO) and raw.fileno() == 0) or os.get_blocking(0):
        return stream  # type: ignore[return-value]
    waiting = io.BufferedReader(Input(0, "rb", closefd=False))
    return io.TextIOWrapper(waiting, encoding=stream.encoding, errors=stream.errors)


def _open_closed() -> None:
    """Open closed standard files (`>&-`), since the next opened file would become file 1 and get the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _over(output: Output, stream: TextIO | None) -> TextIO:
    """A text stream over our file, with the encoding chosen by Python."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors="backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # a character that the terminal cannot show becomes its number
    stream.reconfigure(errors="backslashreplace")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not (isinstance(raw, io.FileIO) and raw.fileno() == output.fileno()):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(output), encoding=stream.encoding, errors="backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
