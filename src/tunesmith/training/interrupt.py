"""Ctrl-C, SIGTERM and a closed terminal: the first asks the run to save and end, the second ends it at once. SIGUSR1
asks for a checkpoint.

Python runs a signal handler in the main thread, between two of its own instructions: not during a long backward pass,
and once for several signals that arrive meanwhile. So a thread listens too. It learns of each signal as it arrives,
says at once what happens next, and ends a process whose main thread does not get to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from tunesmith.errors import InterruptedRun

logger = logging.getLogger(__name__)
_CLOSED = getattr(signal, "SIGHUP", None)  # of the terminal; it may come twice, from the shell and from the system
_SAVES = getattr(signal, "SIGUSR1", None)
_ENDING = (signal.SIGINT, signal.SIGTERM, *([_CLOSED] if _CLOSED else []))
_RAISE_AGAIN_S = 0.2  # the main thread usually takes a signal in less
_PATIENCE_S = 2.0  # then the process is ended, if that is allowed


class StopRequest:
    """Within the `with` block, remembers that a signal asked the run to end.

    Before `defer` is called, and at the second signal, KeyboardInterrupt is raised at once.

    Attributes:
        is_made: a signal asked the run to end.
        is_urgent: a second signal asked for that at once.
        wants_save: SIGUSR1 asked for a checkpoint at the end of the running step; the loop takes it back.
    """

    def __init__(self) -> None:
        self.is_made = self.is_urgent = self.wants_save = False
        self._is_deferred = False
        self._taken = self._heard = 0  # signals seen by the handler and by the listener
        self._before: dict[int, Any] = {}
        self._ears: socket.socket | None = None
        self._mouth: socket.socket | None = None
        self._listener: threading.Thread | None = None
        self._wakeup_before = -1
        self._explain: Callable[[], str] = str
        self._last_words: Callable[[], str] | None = None
        self._has_explained = False
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._is_ending = False
        self._late: int | None = None  # a signal that arrived while the handlers were given back

    def defer(self, explain: Callable[[], str] = str, last_words: Callable[[], str] | None = None) -> None:
        """From here on the loop looks at `is_made`.

        Args:
            explain: says what is finished first and how long that takes; called in another thread.
            last_words: what to print where a second signal does not reach the main thread within seconds; the process
                is then ended. None: it is not.
        """
        self._explain, self._last_words = explain, last_words
        self._is_deferred = True

    def ask(self, name: str) -> None:
        """Another process got a signal, and all of them end; called in another thread.

        Args:
            name: of that process.
        """
        self.is_made = True
        self._say(f"{name} got a signal. ")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():  # Python takes signals nowhere else
            return self
        try:
            self._begin()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_ending = True
        self._has_ended.set()
        self._explain, self._last_words = str, None  # they hold the trainer, and so the model
        self._end(error)

    def _begin(self) -> None:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        for number in _ENDING:
            before = signal.getsignal(number)
            is_nohup = number == _CLOSED and before == signal.SIG_IGN
            if before is not None and not is_nohup:  # None: a handler in C, which Python cannot set again
                self._before[number] = before
                signal.signal(number, self._take)
        # a caller that handles SIGUSR1 by itself keeps it
        if _SAVES is not None and (before := signal.getsignal(_SAVES)) in (signal.SIG_DFL, signal.SIG_IGN):
            self._before[_SAVES] = before
            signal.signal(_SAVES, self._take)

    def _end(self, error: BaseException | None) -> None:
        """Leave the process as it was; also after a part of `_begin`."""
        self._is_ending = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._stop_listening()
        if self._late is not None and not isinstance(error, (InterruptedRun, KeyboardInterrupt)):
            signal.raise_signal(self._late)  # for the caller

    def _stop_listening(self) -> None:
        if self._mouth is None or self._ears is None:
            return
        try:
            signal.set_wakeup_fd(self._wakeup_before)
        except (ValueError, OSError):  # the caller has closed it meanwhile
            signal.set_wakeup_fd(-1)
        if self._listener is None or self._listener.ident is None:  # it never started
            self._ears.close()
        else:
            with contextlib.suppress(OSError):
                self._mouth.shutdown(socket.SHUT_RDWR)  # the listener reads the end of the stream, and ends
            self._listener.join(_PATIENCE_S)
        self._mouth.close()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVES:  # the listener has it
            return
        if self._is_ending:
            self._late = number
            return
        if number == _CLOSED and self.is_made:
            return
        self.is_made = True
        if self._is_deferred:
            self._taken += 1
            if number == _CLOSED or max(self._taken, self._heard) < 2:
                return
            self.is_urgent = True
        raise KeyboardInterrupt

    def _listen(self) -> None:
        """Python writes the number of each signal into the socket when it arrives."""
        assert self._ears is not None
        with self._ears:
            while numbers := self._ears.recv(64):
                for number in numbers:
                    if number not in self._before:
                        self._pass_on(number)
                    elif number == _SAVES:
                        self.wants_save = True
                    elif self._is_deferred and not (number == _CLOSED and self._heard):
                        self._hear()

    def _pass_on(self, number: int) -> None:
        """To the caller's event loop (asyncio, Jupyter), which waits for its own signals."""
        if self._wakeup_before != -1:
            with contextlib.suppress(OSError):  # full, or closed meanwhile
                os.write(self._wakeup_before, bytes([number]))

    def _hear(self) -> None:
        self._heard += 1
        if self._heard == 1:
            self.is_made = True
            self._say()
        elif self._heard == 2:
            threading.Thread(target=self._insist, name="second signal", daemon=True).start()

    def _say(self, who: str = "") -> None:
        """What happens next, once: a launcher passes a signal on to all processes."""
        with self._lock:
            if self._has_explained:
                return
            self._has_explained = True
        if text := self._explain():
            logger.warning("%s", f"{who}{text}")

    def _insist(self) -> None:
        """Make sure that the second signal ends the run."""
        if not self._has_ended.wait(_RAISE_AGAIN_S) and not self.is_urgent:
            signal.raise_signal(signal.SIGINT)  # the two came as one to the main thread
        if self._has_ended.wait(_PATIENCE_S) or self._last_words is None:
            return
        if text := self._last_words():
            print(text, file=sys.stderr, flush=True)
        os._exit(InterruptedRun.exit_code)
