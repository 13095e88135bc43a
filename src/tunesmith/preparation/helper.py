"""Start a helper process of a command: a new interpreter, which signals meant for the command do not end.

A scheduler sends SIGTERM or SIGUSR1 to all processes of a job, and the terminal Ctrl-C to its whole group. The command
decides what happens then; its helpers end when their connection to it closes.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_IGNORED = [
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_BEGIN = (
    f"import signal as s; [s.signal(n, s.SIG_IGN) for n in {_IGNORED}]; "
    f"hasattr(s, 'pthread_sigmask') and s.pthread_sigmask(s.SIG_UNBLOCK, {_IGNORED}); "
)


def start_helper(code: str, *arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    """Start Python with some code and arguments.

    Args:
        settings: of subprocess.Popen.
    """
    words = [sys.executable, "-c", _BEGIN + code, *arguments]
    with _held_signals():  # until the new process has begun to ignore them
        return subprocess.Popen(words, start_new_session=True, **settings)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Signals wait; a process that is started has them wait too."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
