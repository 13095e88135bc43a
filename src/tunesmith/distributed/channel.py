"""What processes tell each other beside their collectives: that they live, and what ended them.

A collective waits for all processes, so it cannot carry the news that one of them has failed. That goes through the
launcher's key-value store, from a thread: also while the main thread is inside a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunesmith.errors import InterruptedRun

_BEAT_S = 0.5
_NOTICE_S = 1.0  # for the main thread to learn of a failure from its own call
_GRACE_S = 6.0  # for the main thread to end by itself after another process has failed
_CALLERS_GRACE_S = 60.0  # where a caller's code runs in the process too, and the launcher (Ray) may end it cleanly
_TOLD_S = 15.0  # for process 0 to tell what happened here
_UNHEARD_S = 4.0  # without a beat: the process has ended
_ASLEEP_S = 5.0  # since the last beat of this process: it did not run, and cannot tell who is silent
LEFT = "left"  # the last sign of life of a process that has ended in order
_FAILED, _TOLD, _STOP = "failed", "told", "stop"
_SUSPECT_S = 1.5  # without a beat, where a signal says that something has happened
_ENDED = (
    "ended without a word.{where} The system kills processes where memory is full (dmesg says so); the launcher's log "
    "has what it printed."
)
_STORE_GONE = "process 0, or the launcher that connects the processes, has ended. The log of its host says why."
_LAUNCHER_GONE = "the launcher of this process has ended, and the run with it. Its log or dmesg says why."
_NO_PROCESS = -1  # the rank of what is not a process of the run
_SILENT = (
    "has not answered for {seconds:.0f} seconds.{where} It is stopped, or its host or network is lost. Look at that "
    "host; where pauses are usual, set TUNESMITH_SILENCE_S higher."
)


def silence_s() -> float:
    """Seconds without a sign of life after which a process counts as lost (TUNESMITH_SILENCE_S)."""
    try:
        return max(2.0, float(os.environ.get("TUNESMITH_SILENCE_S", "")))
    except ValueError:
        return 120.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a process ended.

    Attributes:
        rank: of the process that failed or, where it ended without a word, that was lost.
        exit_code: of the command contract.
        code: of the error, in kebab-case.
    """

    rank: int
    text: str
    exit_code: int
    code: str

    @property
    def prefix(self) -> str:
        """Of the message: an interrupted run is not an error."""
        return "" if self.exit_code == InterruptedRun.exit_code else "error: "


@dataclass(frozen=True, slots=True)
class Sign:
    """The last sign of life of another process.

    Attributes:
        beat: what it wrote; LEFT if it has ended in order.
        at: when that was first seen, by this process's clock.
        order, place: where it was in the run (see `Channel.place`).
    """

    beat: str
    at: float
    order: tuple[int, ...] = ()
    place: str = ""


class Channel:
    """Signs of life, signals and failures of `size` processes.

    Args:
        store: a client of the launcher's store that nothing else uses.
        name: of this process, for messages.
        owns_process: nothing runs in the process but the command.

    Attributes:
        place: where this process is in the run, as numbers that grow and as text; called in another thread.
        on_failure: called in another thread, when another process has failed and the main thread does not know yet.
        on_stop: called once on process 0 in another thread, when another process has got a signal.
        on_end: prints what has ended the run, where the main thread does not.
    """

    def __init__(self, store: Any, rank: int, size: int, name: str, owns_process: bool = True) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.owns_process = owns_process
        self._grace_s = _GRACE_S if owns_process else _CALLERS_GRACE_S
        self._silence_s = silence_s()
        # process 0 listens to all, the others to it: with hundreds of processes more would burden the store
        heard = range(1, size) if rank == 0 else [0]
        self._seen = {other: Sign("", time.monotonic()) for other in heard}
        self._beat_at = time.monotonic()
        self.place: Callable[[], tuple[tuple[int, ...], str]] = lambda: ((), "")
        is_in_main = threading.current_thread() is threading.main_thread()  # not so in a worker of Ray
        self.on_failure: Callable[[], None] = _interrupt_main_thread if is_in_main else do_nothing
        self.on_stop: Callable[[str], None] = lambda name: None
        self._is_noticed = threading.Event()
        self._was_stopped = False
        self._store_lost: float | None = None  # when; its connection does not come back
        self._launcher = os.getppid()
        self._is_closed = threading.Event()
        self.on_end: Callable[[Failure], None] = _print_failure
        self._lock = threading.Lock()
        self._store.set(f"name/{rank}", name)
        self._thread = threading.Thread(target=self._watch, name="channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more signs of life: the process has left the run."""
        self._is_closed.set()
        with contextlib.suppress(Exception):
            if not self._store_lost:
                self._store.set(f"alive/{self._rank}", LEFT)
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _BEAT_S)

    def fail(self, failure: Failure) -> Failure:
        """Tell all processes; the first failure counts, and is returned."""
        if self._store_lost:
            return failure
        with contextlib.suppress(Exception):
            self._store.compare_set(_FAILED, "", json.dumps(asdict(failure)))
        return self.failure() or failure

    def failure(self) -> Failure | None:
        if self._store_lost:
            return None
        try:
            if not self._store.check([_FAILED]):
                return None
            return Failure(**json.loads(self._store.get(_FAILED)))
        except Exception:  # the store has gone with the process that kept it
            return None

    def tell(self) -> None:
        """Process 0 has taken the failure and will print it."""
        self.notice()
        self._promise()

    def _promise(self) -> None:
        if self._store_lost:
            return
        with contextlib.suppress(Exception):
            self._store.set(_TOLD, "1")

    def wait_told(self) -> None:
        """Wait until process 0 prints what happened here: at the end of this process the launcher ends all others."""
        if self._store_lost:
            return
        end = time.monotonic() + _TOLD_S
        with contextlib.suppress(Exception):
            while time.monotonic() < end and not self._store.check([_TOLD]):
                time.sleep(0.1)
        time.sleep(1.0)

    def speaks(self, failure: Failure) -> bool:
        """Whether this process prints a failure: process 0, or where that is lost, the first that still lives."""
        if self._rank == 0 or failure.code != "process-lost":
            return self._rank == 0
        if self._store_lost:
            return self._rank == 1 and not self._has_lost_launcher()
        return failure.rank == 0 and not self._has_living_before()

    def _has_living_before(self) -> bool:
        """Whether a process with a lower number than this one's, and not 0, gives signs of life."""
        before = self._beats(range(1, self._rank))
        time.sleep(2.5 * _BEAT_S)
        return any(beat != before.get(rank) for rank, beat in self._beats(range(1, self._rank)).items())

    def find_cause(self) -> Failure | None:
        """What ended another process, after a collective has failed; None if all live and none has failed."""
        patience_s = _UNHEARD_S + 2 * _BEAT_S
        if self._rank and not self._unheard(_SUSPECT_S):  # process 0 lives, and says what it finds
            patience_s += _UNHEARD_S
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if self._store_lost:
                return self._without_store()
            if found := self.failure():
                return found
            time.sleep(0.1)
        if lost := self._unheard(_UNHEARD_S):
            return self.fail(self._lost(lost[0], _ENDED))
        return None

    def ask_stop(self) -> None:
        """Tell process 0 that a signal asked this process to end."""
        with contextlib.suppress(Exception):
            self._store.compare_set(_STOP, "", str(self._rank))

    def find_lost(self) -> Failure | None:
        """After a signal: what ended another process just before, if that is why the launcher sent it."""
        end = time.monotonic() + _SUSPECT_S + 2 * _BEAT_S
        while time.monotonic() < end:
            if self._store_lost:
                return self._without_store()
            if found := self.failure():
                return found if found.rank != self._rank and found.exit_code != InterruptedRun.exit_code else None
            time.sleep(0.1)
        lost = self._unheard(_SUSPECT_S)
        return self.fail(self._lost(lost[0], _ENDED)) if lost else None

    def signs(self) -> dict[int, Sign]:
        """The last sign of life of each other process."""
        with self._lock:
            return dict(self._seen)

    def name_of(self, rank: int) -> str:
        with contextlib.suppress(Exception):
            if self._store.check([f"name/{rank}"]):
                return str(self._store.get(f"name/{rank}").decode())
        return f"process {rank}"

    def _unheard(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, sign in self.signs().items() if now - sign.at > seconds and sign.beat != LEFT]

    def _lost(self, rank: int, what: str) -> Failure:
        sign = self.signs().get(rank)
        where = f" It was {sign.place}." if sign and sign.place else ""
        return Failure(rank, f"{self.name_of(rank)} {what.format(where=where)}", 4, "process-lost")

    def _watch(self) -> None:
        beat = 0
        while not self._is_closed.wait(_BEAT_S):
            beat += 1
            try:
                self._store.set(f"alive/{self._rank}", json.dumps([beat, *self._place()]))
                self._forgive_sleep()
                self._listen()
            except Exception:  # its keeper has ended, and so has the run
                self._store_lost = time.monotonic()
                self._end_after_grace(self._without_store())
                return
            self._take_stop()
            if found := self.failure() or self._silent():
                self._end_after_grace(found)

    def _has_lost_launcher(self) -> bool:
        return os.getppid() != self._launcher

    def _without_store(self) -> Failure:
        text = _LAUNCHER_GONE if self._has_lost_launcher() else _STORE_GONE
        return Failure(_NO_PROCESS, text, 4, "process-lost")

    def _place(self) -> tuple[tuple[int, ...], str]:
        try:
            return self.place()
        except Exception:  # it changes while it is read
            return (), ""

    def _take_stop(self) -> None:
        if self._rank == 0 and not self._was_stopped:
            with contextlib.suppress(Exception):
                if self._store.check([_STOP]):
                    self._was_stopped = True
                    self.on_stop(self.name_of(int(self._store.get(_STOP))))

    def _forgive_sleep(self) -> None:
        """Where this process did not run for a while (a suspended machine), the others may have slept as well."""
        now = time.monotonic()
        gap, self._beat_at = now - self._beat_at, now
        if gap > _ASLEEP_S:
            with self._lock:
                self._seen = {rank: replace(sign, at=sign.at + gap) for rank, sign in self._seen.items()}

    def _beats(self, ranks: Iterable[int]) -> dict[int, str]:
        keys = {rank: f"alive/{rank}" for rank in ranks}
        if keys and not self._store.check([*keys.values()]):  # some have not joined yet; multi_get would wait for them
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        beats = self._store.multi_get([*keys.values()]) if keys else []
        return {rank: beat.decode() for rank, beat in zip(keys, beats, strict=True)}

    def _listen(self) -> None:
        beats, now = self._beats(self._seen), time.monotonic()
        with self._lock:
            for other, beat in beats.items():
                if beat != self._seen[other].beat:
                    order, place = ([], "") if beat == LEFT else json.loads(beat)[1:]
                    self._seen[other] = Sign(beat, now, tuple(order), place)

    def _silent(self) -> Failure | None:
        lost = self._unheard(self._silence_s)
        if not lost:
            return None
        return self.fail(self._lost(lost[0], _SILENT.replace("{seconds:.0f}", f"{self._silence_s:.0f}")))

    def _end_after_grace(self, failure: Failure) -> None:
        """The main thread learns of it when its collective fails, or here if it does not."""
        if failure.rank != self._rank and not self._is_noticed.wait(_NOTICE_S):
            self.on_failure()
        if self._rank == 0 and failure.exit_code == InterruptedRun.exit_code:
            self._promise()  # with its connections, that process's end breaks the collective that this one waits in
        if not self._is_closed.wait(self._grace_s):
            self._end(failure)

    def notice(self) -> None:
        """The main thread knows of the failure, and ends."""
        self._is_noticed.set()

    def _end(self, failure: Failure) -> None:
        if self._is_closed.is_set():
            return
        if self.speaks(failure):
            self.on_end(failure)
        self.tell()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.exit_code)


def do_nothing() -> None:
    pass


def _interrupt_main_thread() -> None:
    """Another process has failed: raise KeyboardInterrupt where this one works for itself, perhaps for hours."""
    main = threading.main_thread()
    if hasattr(signal, "pthread_kill") and main.ident is not None:
        signal.pthread_kill(main.ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _print_failure(failure: Failure) -> None:
    print(f"{failure.prefix}{failure.text}", file=sys.stderr, flush=True)
