"""Open regular files only: opening a pipe without a writer would block forever."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
from pathlib import Path


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it is not a regular file. A pipe without a writer would block, /dev/zero would never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        require_regular(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def require_regular(path: Path, mode: int) -> None:
    """Check a file mode.

    Raises:
        OSError: the mode (from stat) is not that of a regular file.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file in UTF-8."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8", errors=errors) as file:
        return file.read()


def read_text_or_pipe(path: Path) -> str:
    """The text of a regular file or of a pipe, as in `tunesmith train <(make-config)`."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        return read_text(path)
    pieces = []
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:  # empty without a writer
        while (piece := pipe.read(1 << 16)) != b"":
            if piece is None:
                select.select([pipe], [], [])
            else:
                pieces.append(piece)
    return b"".join(pieces).decode()
