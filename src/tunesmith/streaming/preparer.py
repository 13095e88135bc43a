"""The run's side of the labelling process: start it, let it go on, get its windows or its error, end it."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import DataError, RunError
from tunesmith.preparation.helper import start_helper
from tunesmith.streaming.job import Job
from tunesmith.streaming.worker import Failure

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tunesmith.streaming.worker import main; main()"
_STDERR_LINES = 20


class Preparer:
    """A process that labels a job into windows. It ends when it is closed, when this object is gone, or with us."""

    def __init__(self, job: Job) -> None:
        self.start = job.start
        self._changed = threading.Condition()
        self._done = job.start.number - 1
        self._failure: Failure | None = None
        self._has_ended = False
        self._process = start_helper(
            _CODE, json.dumps([path for path in sys.path if isinstance(path, str)]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._finalizer = weakref.finalize(self, _end, self._process)
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout
        assert stderr
        assert self._process.stdin
        self._said: deque[str] = deque(maxlen=_STDERR_LINES)
        me = weakref.ref(self)  # so that the threads do not keep it
        threading.Thread(target=_collect, args=(stderr, self._said), name="labelling stderr", daemon=True).start()
        threading.Thread(target=_listen, args=(stdout, me), name="labelling", daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # it ended: `has` says why
            pickle.dump(job, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def allow(self, folder: Path, up_to: int) -> None:
        """Let it write windows up to this number into a folder."""
        line = json.dumps({"folder": str(folder), "up_to": up_to})
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert self._process.stdin
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def has(self, number: int, wait_s: float) -> bool:
        """Whether a window is written; waits some time for it.

        Raises:
            DataError, OSError, MemoryError: why it cannot be.
            RunError: the process has ended without a word.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done >= number or self._failure or self._has_ended, wait_s)
            if self._done >= number:
                return True
            if self._failure:
                raise as_error(self._failure)
            if self._has_ended:
                raise RunError(self._explain_end(), code="labelling-ended")
            return False

    def _explain_end(self) -> str:
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        said = next((line for line in reversed(self._said) if line.strip()), "")
        advice = " Out of memory is the usual cause; close other programs." if code == -9 else ""
        return f"the process that labels rows ended ({how}){f': {said}' if said else ''}.{advice}"

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def take(self, answer: Mapping[str, Any]) -> None:
        with self._changed:
            if "error" in answer:
                self._failure = Failure(**answer["error"])
            else:
                self._done = answer["window"]
            self._changed.notify_all()

    def take_end(self) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


def _listen(stdout: IO[bytes], owner: weakref.ref[Preparer]) -> None:
    with stdout:
        for line in stdout:
            preparer = owner()
            with contextlib.suppress(ValueError):  # half a line of a killed process
                if preparer:
                    preparer.take(json.loads(line))
            del preparer
    if preparer := owner():
        preparer.take_end()


def _collect(stderr: IO[bytes], said: deque[str]) -> None:
    with stderr:
        for line in stderr:
            said.append(line.decode(errors="replace").rstrip())


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
    process.kill()
    process.wait()


def as_error(failure: Failure) -> BaseException:
    """The error that ended the labelling."""
    if failure.kind == "ours":
        return DataError(failure.text, code=failure.code)
    if failure.kind == "memory":
        return MemoryError(failure.text)
    if failure.kind == "system":
        return OSError(failure.errno, failure.text, failure.file)
    return RuntimeError(f"the labelling process failed:\n{failure.text}")
