"""Import and start DeepSpeed quietly, and say what it compiles or waits for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.distributed.world import World
from tunesmith.errors import RunError, TunesmithError

_UNHELD_S = 3.0  # without a holder, a lock is left over
_POLL_S = 0.2
_UNUSED_OP = "deepspeed_shm_comm"  # a sum for inference on CPUs, over a minute to compile
_TAIL = 600  # characters of what DeepSpeed printed before it failed


@contextmanager
def ready_deepspeed(world: World, device: torch.device, tell: Callable[[str], None]) -> Iterator[Any]:
    """The module `deepspeed`, in a block in which what it prints is kept from the user.

    Args:
        tell: shows a remark to the user.

    Raises:
        RunError: it cannot start, or would wait for a lock that nobody holds.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # which DeepSpeed reads
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _Quiet() as quiet:

        def say(text: str) -> None:
            with quiet.lifted():
                tell(text)

        try:
            with world.explained(), watched_compiler(say), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import deepspeed

                logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
                with contextlib.suppress(AttributeError, TypeError):
                    deepspeed.ops.__compatible_ops__[_UNUSED_OP] = False
                yield deepspeed
        except (TunesmithError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            printed = quiet.text()[-_TAIL:].strip()
            raise RunError(
                f"DeepSpeed cannot start: {type(error).__name__}: {' '.join(str(error).split())[:_TAIL]}"
                f"{' It printed: ' + printed if printed else ''}",
                code="deepspeed-failed",
            ) from error
    # it calls collectives by names that torch will remove, at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


@contextmanager
def watched_compiler(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block, a compiler run of torch's extensions is announced, and so is waiting for one.

    torch marks a run by a lock file, which a killed process leaves behind; others wait for it without end.
    """
    from torch.utils.file_baton import FileBaton

    acquire, wait = FileBaton.try_acquire, FileBaton.wait

    def try_acquire(baton: FileBaton) -> bool:
        is_acquired = bool(acquire(baton))
        folder = Path(baton.lock_file_path).parent
        if is_acquired and not any(folder.glob("*.so")):
            say(f"note: DeepSpeed compiles {folder.name}, once for this machine; this takes a minute or two ({folder})")
        return is_acquired

    def wait_watched(baton: FileBaton) -> None:
        wait_for_lock(Path(baton.lock_file_path), say)

    kind: Any = FileBaton
    kind.try_acquire, kind.wait = try_acquire, wait_watched
    try:
        yield
    finally:
        kind.try_acquire, kind.wait = acquire, wait


def wait_for_lock(lock: Path, say: Callable[[str], None]) -> None:
    """Wait until another process has compiled.

    Raises:
        RunError: no process of this host holds the lock.
    """
    has_said = False
    unheld_since: float | None = None
    while lock.exists():
        holder = find_holder(lock)
        if holder is not None and not has_said:
            say(f"note: waiting for process {holder}, which compiles {lock.parent.name} for DeepSpeed")
            has_said = True
        unheld_since = None if holder is not None else unheld_since or time.monotonic()
        if unheld_since is not None and time.monotonic() - unheld_since > _UNHELD_S and can_find_holders():
            raise RunError(
                f"{lock}: is the lock of a compiler run that no process on this host holds, probably one that was "
                f"killed. DeepSpeed would wait for it without end. Delete it and start again: rm '{lock}' (unless "
                "another host that shares this folder compiles now).",
                code="deepspeed-lock",
            )
        time.sleep(_POLL_S)


def can_find_holders() -> bool:
    return Path("/proc/self/fd").is_dir()


def find_holder(lock: Path) -> int | None:
    """Number of a process of this host that has the file open; torch keeps it open while it compiles."""
    try:
        wanted = lock.stat()
    except OSError:
        return None
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return int(entry.parts[2])
    return None


class _Quiet:
    """Send to a file what this process and its children print, until the end of the block.

    Only standard output: what ends the run meanwhile, another process or a signal, is told on standard error.
    """

    def __enter__(self) -> _Quiet:
        self._file = tempfile.TemporaryFile()
        sys.stdout.flush()
        self._saved = os.dup(1)
        os.dup2(self._file.fileno(), 1)
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()
        os.dup2(self._saved, 1)
        os.close(self._saved)
        self._file.close()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        sys.stdout.flush()
        os.dup2(self._saved, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(self._file.fileno(), 1)

    def text(self) -> str:
        sys.stdout.flush()
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), size, 0).decode(errors="replace")
