"""Standard input and output that may be closed, full, or left by their reader, without ending the work.

`tunesmith train ... | head -1` trains on without a reader. A command whose purpose is to print ends there instead.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator


class OutputLost(BaseException):
    """Standard output takes no more text, and printing was the purpose. No Exception: nobody but `main` handles it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.error = error

    @property
    def has_reader_left(self) -> bool:
        return self.error.errno == errno.EPIPE


class Output(io.FileIO):
    """File 1 or 2; once writing fails, what follows goes nowhere.

    Attributes:
        ends_without_reader: whether OutputLost ends the command where the reader has left.
        ends_when_full: the same where writing fails for another reason.
        failure: the first error.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.ends_without_reader = self.ends_when_full = False
        self.failure: OSError | None = None

    def write(self, data: object) -> int:
        try:
            # None: the pipe is full, and its other holder set it not to wait (O_NONBLOCK), as node and some CI do
            while (written := super().write(data)) is None:  # type: ignore[call-overload]
                select.select([], [self], [])
            return written  # type: ignore[no-any-return]
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
                    reason = "nobody reads it any more" if has_left else error.strerror
                    print(f"note: standard output: {reason}; the work goes on without it", file=sys.stderr)
            return len(data)  # type: ignore[arg-type]


class Input(io.FileIO):
    """File 0 where its other holder set it not to wait: what has no text yet is waited for."""

    def readinto(self, buffer: object) -> int:
        while (size := super().readinto(buffer)) is None:  # type: ignore[arg-type]
            select.select([self], [], [])
        return size


@contextlib.contextmanager
def lasting_streams() -> Iterator[Output]:
    """Puts such files under sys.stdout and sys.stderr; yields the one under stdout.

    Streams that are no files 1 and 2 (a notebook's, a test's) stay as they are.
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
    """`>&-`: the next file that is opened would become file 1, and text for the terminal would land in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _over(output: Output, stream: io.TextIOBase | None) -> io.TextIOWrapper:
    """A text stream over our file, with the encoding that Python chose for it."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors="backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # type: ignore[return-value]
    # a terminal that lacks a character gets its number, not a traceback
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
