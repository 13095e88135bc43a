"""Modes of the terminal: keys that are typed while the program works are neither shown nor lost."""

from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tunesmith.display import hidden_removed

_LONGEST = 1 << 20  # bytes that may be typed or pasted meanwhile


@contextmanager
def no_echo() -> Iterator[None]:
    """Typed keys are not shown meanwhile: they would break a line that is being drawn. Ctrl-C still works."""
    with _changed_mode(termios.ECHO):
        yield


@contextmanager
def held_keys() -> Iterator[None]:
    """As `no_echo`; `typed_ahead` then returns what was typed, even without Enter."""
    with _changed_mode(termios.ECHO | termios.ICANON):
        yield


@contextmanager
def _changed_mode(without: int) -> Iterator[None]:
    before = _mode()
    if before is None:
        yield
        return
    changed = before[:]
    changed[3] &= ~without  # the local modes
    _set_mode(changed)
    try:
        yield
    finally:
        _set_mode(before)


def typed_ahead() -> str:
    """What was typed or pasted and not read yet, as text without control characters; call it within `held_keys`."""
    data = b""
    with suppress(OSError, ValueError):
        while len(data) < _LONGEST and select.select([sys.stdin], [], [], 0)[0]:
            if not (piece := os.read(sys.stdin.fileno(), 65536)):
                break
            data += piece
    return hidden_removed(data.decode("utf-8", errors="replace").replace("\r", "\n")).strip("\n")


def _mode() -> list[Any] | None:
    """None where standard input is no terminal, or another process has it: changing it would stop this one."""
    try:
        number = sys.stdin.fileno()
        if os.isatty(number) and os.tcgetpgrp(number) == os.getpgrp():
            return termios.tcgetattr(number)
    except (AttributeError, OSError, ValueError, termios.error):
        pass
    return None


def _set_mode(mode: list[Any]) -> None:
    if _mode() is not None:  # may be in the background by now
        with suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, mode)
