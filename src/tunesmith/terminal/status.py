"""One line at the bottom of a terminal that says what is being done until the next output replaces it."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from typing import TextIO

from tunesmith.display import VisibleStream, one_line, raw_stream


def show_status(text: str) -> None:
    """Show the line; not where standard output is no terminal, and not outside of the command."""
    stream, errors = sys.stdout, sys.stderr
    if not (isinstance(stream, VisibleStream) and stream.isatty()):
        return
    raw = raw_stream(sys.stdout)  # erases the line before
    line = f"{one_line(text)} ..."[: shutil.get_terminal_size().columns - 1]
    raw.write(line)
    raw.flush()
    erase = partial(_erase, raw, len(line))
    for shown in (stream, errors):
        if isinstance(shown, VisibleStream):
            shown.before_write = erase


def _erase(raw: TextIO, length: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, VisibleStream):
            stream.before_write = None
    raw.write("\r" + " " * length + "\r")
    raw.flush()
