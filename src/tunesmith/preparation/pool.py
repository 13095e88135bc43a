"""Apply a function to items in several processes, with the results in order.

The processes are new interpreters, not copies of this one: torch, CUDA and the tokenizer's threads may be running here,
and a caller's script need not be written for multiprocessing (no `if __name__ == "__main__"`). They end with this
process however it ends, since each waits for the end of its connection in a thread of its own. Signals do not end them
(see helper.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

from tunesmith.errors import RunError
from tunesmith.preparation.helper import start_helper

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
_AHEAD = 2  # items that a worker has, one of them waiting
_ENDS_S = 2.0  # a worker's time to end by itself
_CODE = "import sys; sys.path[:] = {path!r}; from tunesmith.preparation.worker import serve; serve({fd})"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")  # one in each worker


class Setup(Protocol[Item_contra, Result_co]):
    """Sent to each worker once: picklable, with a method that makes the function there."""

    def open(self) -> Callable[[Item_contra], Result_co]: ...


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        code = _CODE.format(path=sys.path, fd=theirs.fileno())
        try:
            self.process = start_helper(
                code,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **dict.fromkeys(_THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            theirs.close()
        self.waiting: list[int] = []  # numbers of the items that it has

    def explain_end(self) -> RunError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_ENDS_S)
        code = self.process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            cause = "; the system does that where memory runs out" if name == "SIGKILL" else ""
            what = f"was ended by the signal {name}{cause}"
        else:
            what = "ended" if code is None else f"ended with code {code}"
        return RunError(
            f"preparing the data: a worker process {what}. Use fewer with --data.workers N (0: only this process), or "
            "free memory.",
            code="worker-died",
        )

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.kill()
            self.process.wait()
        except OSError:
            pass


def available_cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than its container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(int(quota) / int(period))))  # "max" where there is no limit
    return cores


class Pool(Generic[Item, Result]):
    """Workers that share the items given to `map`.

    Args:
        setup: makes the function in each worker.
        num_workers: processes; 0 computes in this one.
        here: the function in this process, also for items that `stays_here` picks.
    """

    def __init__(self, setup: Setup[Item, Result] | None, num_workers: int, here: Callable[[Item], Result]) -> None:
        self._setup, self._num_workers, self._here = setup, num_workers if setup is not None else 0, here
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()

    def _start(self) -> None:
        while len(self._workers) < self._num_workers:
            worker = _Worker()
            self._workers.append(worker)
            self._send(worker, self._setup)

    def map(
        self,
        items: Iterable[Item],
        stays_here: Callable[[Item], bool] = lambda item: False,
        starts_at: Callable[[Item], bool] = lambda item: True,
    ) -> Iterator[Result]:
        """The results in the order of the items; at most a few items a worker are in memory.

        Args:
            stays_here: items that this process computes itself, when all before them are done.
            starts_at: the first item for workers; until it comes, this process computes (starting takes a second).

        Raises:
            RunError: a worker was killed.
            Exception: what the function raised for the first item that it fails for.
        """
        number = expected = 0
        done: dict[int, Any] = {}
        is_started = False
        for item in items:
            is_started = is_started or (self._num_workers > 0 and starts_at(item))
            if not is_started or stays_here(item):
                while expected < number:
                    yield self._take(done, expected)
                    expected += 1
                yield self._here(item)
                number = expected = number + 1
                continue
            self._start()
            while number - expected >= _AHEAD * len(self._workers) + len(self._workers):
                yield self._take(done, expected)
                expected += 1
            worker = self._least_busy()
            while len(worker.waiting) >= _AHEAD:
                self._receive(done)
                worker = self._least_busy()
            self._send(worker, item)
            worker.waiting.append(number)
            number += 1
            while expected in done:
                yield self._take(done, expected)
                expected += 1
        while expected < number:
            yield self._take(done, expected)
            expected += 1

    def _least_busy(self) -> _Worker:
        return min(self._workers, key=lambda one: len(one.waiting))

    def _take(self, done: dict[int, Any], number: int) -> Result:
        while number not in done:
            self._receive(done)
        outcome = done.pop(number)
        if isinstance(outcome, BaseException):
            raise outcome
        return cast("Result", outcome)

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, ConnectionError):
            raise worker.explain_end() from None

    def _receive(self, done: dict[int, Any]) -> None:
        """Wait for the next results of any worker."""
        busy = {worker.connection: worker for worker in self._workers if worker.waiting}
        for ready in wait(list(busy)):
            worker = busy[cast("Connection", ready)]
            try:
                outcome = worker.connection.recv()
            except (EOFError, ConnectionError):
                raise worker.explain_end() from None
            done[worker.waiting.pop(0)] = outcome
