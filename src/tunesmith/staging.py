"""A folder that appears complete or not at all, and is locked by one process at a time."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.files import sync_tree, take_name, usual_modes, write_text_atomic
from tunesmith.runfolder import RUN_FILE

_MOVING = "moving"  # lists the parts that are being moved into RUN


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes RUN at the end of the block; on any error it is deleted.

    It is created next to RUN, even if RUN exists and is empty. If RUN is a mount point, or its parent folder is not
    writable, it is created inside RUN.
    """
    # names sort by time: of two processes, the earlier one continues
    name = f".{output.name}.{time.time_ns():020}-{uuid.uuid4().hex[:8]}.partial"
    is_inside = output.is_dir() and (output.is_mount() or not os.access(output.parent, os.W_OK))
    staging = output / name if is_inside else output.with_name(name)
    missing = [parent for parent in staging.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise TunesmithError(
            f"{output}: cannot be created: {error.strerror}. Give another --output.", code="output-not-creatable"
        ) from None
    try:
        with locked(staging):
            remove_abandoned(staging.parent, output.name)
            refuse_second(staging, output)
            yield staging
            usual_modes(staging)
            sync_tree(staging)
            if is_inside:
                _move_in(staging, output)
            else:
                take_name(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # another process has put something there
                parent.rmdir()
        raise


def refuse_second(staging: Path, output: Path) -> None:
    """Check for other processes.

    Raises:
        TunesmithError: another process started earlier to prepare the same run and is still running.
    """
    partial = [path for path in staging.parent.iterdir() if is_partial(path, output.name)]
    if min(partial) != staging:
        raise TunesmithError(
            f"{output}: another process is preparing this run. Wait for it, or give --output a new folder.",
            code="output-taken",
        )


def _move_in(staging: Path, output: Path) -> None:
    """Move each part; run.json, which makes the folder a run, moves last."""
    parts = sorted(staging.iterdir(), key=lambda path: path.name == RUN_FILE)
    write_text_atomic(staging / _MOVING, "\n".join(path.name for path in parts))
    for path in parts:
        path.rename(output / path.name)
    shutil.rmtree(staging)


def is_partial(path: Path, name: str) -> bool:
    """Whether a folder is a staging folder of the run `name`, of a running or a killed process."""
    return re.fullmatch(rf"\.{re.escape(name)}\.([0-9]{{20}}-)?[0-9a-f]{{8}}\.partial", path.name) is not None


def remove_abandoned(parent: Path, name: str) -> None:
    """Delete staging folders of the same run left by killed processes; a running one has its folder locked.

    In a folder that existed before, a process may have been killed while moving the parts: without run.json they are
    not a run, and are deleted too.
    """
    for folder in parent.iterdir():
        if not is_partial(folder, name):
            continue
        try:
            with locked(folder):
                if (folder / _MOVING).is_file() and not (parent / RUN_FILE).exists():
                    for part in (folder / _MOVING).read_text(encoding="utf-8").splitlines():
                        moved = parent / Path(part).name
                        shutil.rmtree(moved) if moved.is_dir() else moved.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, TunesmithError):
            continue


@contextmanager
def locked(run: Path, required: bool = False) -> Iterator[None]:
    """Lock a run for this process; the lock ends with the process.

    Args:
        required: raise an error where folders cannot be locked (Windows, some file systems), so that nobody can know
            whether another process uses it.

    Raises:
        TunesmithError: another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        if required:
            raise _no_lock(run) from None
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TunesmithError(
                f"{run}: is being trained by another process. Wait until it has finished.", code="run-in-use"
            ) from None
        except OSError:  # a file system without locks
            if required:
                raise _no_lock(run) from None
        yield
    finally:
        os.close(handle)


def _no_lock(run: Path) -> TunesmithError:
    return TunesmithError(f"{run}: its file system has no locks. Use another.", code="no-locks")
