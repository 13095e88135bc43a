"""Run tunesmith's command in a forked child: starts in milliseconds, with limits and any standard input and output.

The parent has imported torch without using it, so each child is an ordinary process. fuzz.py forks from itself. Tests
start `forks.py` as a server: one JSON object per line with the arguments of `run_forked`, answered by one Outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models a second thread costs more than it gains

import datasets
import peft
import transformers
from torch import _dynamo  # noqa: F401  # slow to import, and every optimizer imports it

from tunesmith.cli import main
from tunesmith.demo import run as _demo  # noqa: F401  # imported once here, not in every child
from tunesmith.model import bpe as _bpe  # noqa: F401
from tunesmith.report import replies as _replies
from tunesmith.run import resume as _resume  # noqa: F401
from tunesmith.use import chat as _chat  # noqa: F401
from tunesmith.use import check as _check  # noqa: F401
from tunesmith.use import merge as _merge  # noqa: F401

assert all((datasets, peft, transformers))
CLOSED = "closed"
LEAVING = "leaving"  # a reader that closes the pipe after one line, like `head -1`


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code is None if it exceeded its time limit and was killed; negative: killed by that signal."""

    code: int | None
    out: str
    err: str
    seconds: float
    max_rss_mb: int


def run_forked(
    words: Sequence[str],
    cwd: str = ".",
    stdin: str = os.devnull,
    stdout: str = "",
    stderr: str = "",
    limit_s: float = 60,
    limit_gb: float = 6,
    interrupt_at: str = "",
    interrupt_after_s: float = math.inf,
    number: int = signal.SIGINT,
    environment: dict[str, str] | None = None,
    full_replies: bool = False,
) -> Outcome:
    """Run the command with `words` as arguments.

    Args:
        stdin: a path, or CLOSED.
        stdout: a path, CLOSED or LEAVING; if empty, it is returned. The same for stderr, except LEAVING.
        interrupt_at: a text of stdout, an absolute path, or PATH?TEXT; when it appears, signal `number` is sent.
        interrupt_after_s: send the signal after this time.
        full_replies: as many sample replies in a run's report as for users; by default one short reply, since they
            take longer than everything else.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = [Path(folder, "out"), Path(folder, "err")]
        reader, writer = os.pipe() if stdout == LEAVING else (-1, -1)
        began = time.monotonic()
        child = os.fork()
        if not child:
            if not full_replies:
                _replies.NUM_SAMPLES, _replies._REPLY_TOKENS = 1, 3
            _be_child(
                words, cwd, [stdin, stdout or str(kept[0]), stderr or str(kept[1])], writer, limit_gb, environment
            )
        if writer >= 0:
            os.close(writer)
            with os.fdopen(reader) as pipe:
                first = pipe.readline()
        code, rss = _wait(child, began + limit_s, interrupt_at, began + interrupt_after_s, number, kept[0])
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in kept]
        return Outcome(code, first if writer >= 0 else texts[0], texts[1], time.monotonic() - began, rss // 1024)


def _be_child(
    words: Sequence[str], cwd: str, names: list[str], writer: int, limit_gb: float, environment: dict[str, str] | None
) -> None:
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background processes
        os.environ.update(environment or {})
        size = int(limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        streams = [sys.stdin, sys.stdout, sys.stderr]
        for at, name in enumerate(names):
            if name == CLOSED:
                os.close(at)
                streams[at] = None  # type: ignore[call-overload]  # as Python starts
                continue
            flags = os.O_RDONLY if at == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            file = writer if name == LEAVING else os.open(name, flags, 0o644)
            os.dup2(file, at)
            os.close(file)
        sys.stdin, sys.stdout, sys.stderr = streams
        os.chdir(cwd)
        code = main(list(words))
    except KeyboardInterrupt:
        code = 3  # as __main__ does
    except BaseException:
        import traceback

        os.write(2, f"UNCAUGHT {traceback.format_exc()}".encode(errors="replace"))
    finally:
        os._exit(code)


def _wait(
    child: int, deadline: float, interrupt_at: str, interrupt_time: float, number: int, out: Path
) -> tuple[int | None, int]:
    pause, is_sent = 0.002, not interrupt_at and interrupt_time == math.inf
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # including its children
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return None, usage.ru_maxrss
        if not is_sent and (time.monotonic() > interrupt_time or _appeared(interrupt_at, out)):
            time.sleep(0.02)
            os.kill(child, number)
            is_sent = True
        time.sleep(pause)
        pause = pause if not is_sent else min(pause * 1.3, 0.03)


def _appeared(what: str, out: Path) -> bool:
    if not what:
        return False
    if what.startswith("/"):
        name, _, text = what.partition("?")
        return os.path.lexists(name) and (not text or text in Path(name).read_text(errors="replace"))
    return out.exists() and what in out.read_text(errors="replace")


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    for line in sys.stdin:
        print(json.dumps(asdict(run_forked(**json.loads(line)))), flush=True)
