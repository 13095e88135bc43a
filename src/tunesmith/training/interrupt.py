"""Ctrl-C and SIGTERM: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Within the `with` block, remembers that a signal asked the run to end.

    Before `defer` is called, and at the second signal, KeyboardInterrupt is raised at once.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def defer(self) -> None:
        """From here on the loop looks at `is_made` after each step."""
        self._is_deferred = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._is_deferred and not self.is_made:
            self.is_made = True
            return
        raise KeyboardInterrupt
