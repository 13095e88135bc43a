"""The labelling process: writes windows ahead of training, as far as it is told to, and ends with the run's process.

Standard input brings the pickled job, then one line of JSON each time it may go on: {"folder", "up_to"}. Its end means
that the run's process has ended, however that was killed. Standard output has one line for each finished window:
{"window": N}, and {"window": N, "error": {...}} where the window cannot be made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import TunesmithError
from tunesmith.files import is_out_of_memory, system_error
from tunesmith.streaming.windows import WindowWriter

_NICE = 5  # training goes first, once there is a first window


class _Orders:
    """How far the run's process lets this one go on."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._folder, self._up_to = Path(), -1
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        for line in self._source:
            order = json.loads(line)
            with self._changed:
                self._folder, self._up_to = Path(order["folder"]), order["up_to"]
                self._changed.notify_all()
        os._exit(0)  # in the middle of a window: nobody will read it

    def wait_for(self, number: int) -> Path:
        """Wait until a window may be written; returns the folder for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._up_to >= number)
            return self._folder


def main() -> None:
    """Label a job into windows until the run's process ends, or a window cannot be made."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    job = pickle.load(sys.stdin.buffer)  # from our own parent process
    orders = _Orders(sys.stdin.buffer)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    number = job.start.number
    try:
        writer = WindowWriter(job, job.encoder.build())
        while True:
            number = writer.start.number
            writer.write_next(orders.wait_for(number))
            answer({"window": number})
            if number == job.start.number:
                _give_way()
    except BrokenPipeError:
        return
    except BaseException as error:
        answer({"window": number, "error": asdict(Failure.of(error))})


def _give_way() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICE)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that can be sent as JSON, and made again on the other side (`preparer.as_error`).

    Attributes:
        kind: ours, memory, system or bug.
        code: of one of ours.
        errno, file: of a system call.
    """

    kind: str
    text: str
    code: str = ""
    errno: int | None = None
    file: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        if isinstance(error, TunesmithError):
            return cls("ours", str(error), code=error.code)
        if is_out_of_memory(error):
            return cls("memory", str(error))
        if (found := system_error(error)) is not None:
            name = os.fspath(found.filename) if isinstance(found.filename, (str, os.PathLike)) else None
            return cls("system", found.strerror or str(found), errno=found.errno, file=name)
        return cls("bug", "".join(traceback.format_exception(error)))
