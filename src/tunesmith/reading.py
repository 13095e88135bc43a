"""Files opened for reading only where they are files: a pipe that nobody writes to would be waited for without end."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
from pathlib import Path


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, to be read.

    Raises:
        OSError: it is anything else. A pipe that nobody writes to would never open, /dev/zero never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        require_regular(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def require_regular(path: Path, mode: int) -> None:
    """Raises:
    OSError: a mode (from stat) that is no file's.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file, UTF-8."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8", errors=errors) as file:
        return file.read()


def read_text_or_pipe(path: Path) -> str:
    """The text of a regular file, or of a pipe to its end, as in `tunesmith train <(make-config)`."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        return read_text(path)
    pieces = []
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:  # without a writer it is empty
        while (piece := pipe.read(1 << 16)) != b"":
            if piece is None:
                select.select([pipe], [], [])
            else:
                pieces.append(piece)
    return b"".join(pieces).decode()
