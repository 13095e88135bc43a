"""Warn while a step takes far longer than the steps before it, and name the process and rows that it waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.display import format_seconds
from tunesmith.monitor.pace import Pace

logger = logging.getLogger(__name__)
TIMES = 10.0  # the usual time
_TICK_S = 1.0
_ASLEEP_S = 5.0  # without a tick: this process did not run (a suspended machine, a debugger)
_REPEAT_S = 600.0  # between two warnings: a machine that has become slow is said once in a while
_SILENT_S = 5.0  # without a sign of life


@dataclass(frozen=True, slots=True)
class Peer:
    """What another process last said of itself.

    Attributes:
        order: of its place in the run; larger is further on.
        silent_s: seconds since then; a living process says it about twice a second.
    """

    name: str
    order: tuple[int, ...]
    text: str
    silent_s: float


class Watchdog:
    """Looks at `pace` once a second.

    A step is slow if it takes ten times as long as the median of the last steps, in proportion to its tokens or to
    the squares of its documents' lengths, whichever is more. The first steps, evaluations, saves, and time in which
    this process did not run do not count.

    Args:
        peers: the other processes.
        floor_s: a step that takes less is never slow.
    """

    def __init__(
        self,
        pace: Pace,
        peers: Callable[[], Sequence[Peer]] = tuple,
        name: str = "",
        floor_s: float = 10.0,
        warn: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace, self._peers, self._name, self._floor_s, self._clock = pace, peers, name, floor_s, clock
        self._warn = warn or (lambda text: logger.warning("%s", text))
        self._step, self._slow_step = 0, 0
        self._asleep_s = 0.0  # within the running step
        self._seen_at = clock()
        self._warned_at = -_REPEAT_S

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look while the block runs."""
        has_ended = threading.Event()

        def watch() -> None:
            while not has_ended.wait(_TICK_S):
                self.look()

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join(2 * _TICK_S)

    def look(self) -> None:
        now, step = self._clock(), self._pace.running_step
        gap, self._seen_at = now - self._seen_at, now
        if step != self._step:
            self._end_step(step)
        elif gap > _ASLEEP_S:
            self._asleep_s += gap
        usual = self._pace.usual_s()
        if not step or usual is None or step == self._slow_step:
            return
        seconds = self._pace.seconds() - self._asleep_s
        if seconds < max(self._floor_s, TIMES * usual):
            return
        self._slow_step = step
        if now - self._warned_at >= _REPEAT_S:
            self._warned_at = now
            self._warn(
                f"warning: step {step} has taken {format_seconds(seconds)}, {seconds / usual:.0f} times the usual "
                f"{format_seconds(usual)}; {self._explain()}"
            )

    def _end_step(self, step: int) -> None:
        self._step, self._asleep_s = step, 0.0

    def _explain(self) -> str:
        order, text = self._pace.position()
        peers = [Peer(self._name, order, text, 0.0), *self._peers()]
        if len(peers) == 1:
            return f"it is {text}"
        first = min(peer.order for peer in peers)
        behind = [peer for peer in peers if peer.order == first]
        if len(behind) == len(peers):  # they wait for each other, or all of them are slow
            silent = [peer for peer in peers if peer.silent_s > _SILENT_S]
            if not silent:
                return f"all {len(peers)} processes are {text}"
            behind = silent
        return "; ".join(map(_describe, behind[:4]))


def _describe(peer: Peer) -> str:
    if peer.silent_s > _SILENT_S:
        return f"{peer.name} has given no sign of life for {format_seconds(peer.silent_s)}; it was {peer.text}"
    return f"{peer.name} is {peer.text}"
