"""The RUN folder: made whole or not at all, held by one process at a time, with room for what will be written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.config import RunConfig
from tunesmith.errors import TunesmithError
from tunesmith.model.loss import SupervisedLM
from tunesmith.train.checkpoint import estimate_bytes
from tunesmith.train.console import format_bytes
from tunesmith.train.failures import RUN_FILE
from tunesmith.train.loop import DEFAULT_SAVE_STEPS


def resolve_output(name: str) -> Path:
    """The RUN folder's real path; it must not exist yet or be empty.

    Raises:
        TunesmithError: it is in use, or no path at all.
    """
    try:
        output = Path(name).expanduser().resolve()
        if output.is_file():
            raise TunesmithError(f"{name}: is a file; give --output a folder that does not exist yet.")
        if output.is_dir() and any(output.iterdir()):
            raise TunesmithError(_explain_taken(name, output))
    except (OSError, RuntimeError) as error:  # RuntimeError: ~somebody without a home
        reason = getattr(error, "strerror", None) or error
        raise TunesmithError(f"{name[:80]}: cannot be used as --output: {reason}") from None
    return output


def _explain_taken(name: str, output: Path) -> str:
    if (output / RUN_FILE).exists() and not any((output / name).exists() for name in ("model", "adapter")):
        return (
            f"{name}: holds a run that has not finished. Go on with it: tunesmith resume {name}. Or give --output a "
            "new folder."
        )
    what = "holds another run" if (output / "config.yaml").exists() else "is not empty"
    return f"{name}: {what}; give --output a new folder, or remove this one."


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder to prepare in, whose contents become RUN at the end of the block; on any error nothing stays.

    It lies beside RUN, or inside it where RUN exists already and is empty (it may be a mount of its own).
    """
    name = f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    is_there = output.is_dir()
    staging = output / name if is_there else output.with_name(name)
    missing = [parent for parent in staging.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise TunesmithError(f"{output}: cannot be made: {error.strerror}.") from None
    try:
        with locked(staging):
            remove_abandoned(staging.parent, output.name)
            yield staging
        if is_there:
            for child in sorted(staging.iterdir(), key=lambda path: path.name == RUN_FILE):  # it makes a run of it
                child.rename(output / child.name)
            staging.rmdir()
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


def remove_abandoned(parent: Path, name: str) -> None:
    """What killed processes left when they prepared the same run; a living one holds its lock."""
    for folder in parent.iterdir():
        if folder.name.startswith(f".{name}.") and folder.name.endswith(".partial"):
            try:
                with locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            except (OSError, TunesmithError):
                continue


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Only one process may train a run; the lock goes with the process, however it ends.

    Raises:
        TunesmithError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TunesmithError(f"{run}: is being trained by another process. Let it end first.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def require_room(folder: Path, lm: SupervisedLM, config: RunConfig, total_steps: int) -> str:
    """What will be written, for the summary.

    Raises:
        TunesmithError: there is no room for one checkpoint and the model.
    """
    one, weights = estimate_bytes(lm)
    free = shutil.disk_usage(folder).free
    train = config.train
    if free < one + weights:
        raise TunesmithError(
            f"{train.output_dir}: a checkpoint and the model take about {format_bytes(one + weights)}, and "
            f"{format_bytes(free)} are free there. Make room, or give --output another disk."
        )
    line = f"checkpoints of about {format_bytes(one)} each, {train.keep_checkpoints} kept"
    count = min(train.keep_checkpoints + 1, -(-total_steps // (train.save_steps or DEFAULT_SAVE_STEPS)))
    needed = one * (count + bool(train.eval_steps)) + weights
    if free < needed:
        line += (
            f"; {format_bytes(free)} are free, less than the {format_bytes(needed)} that the run may come to need: "
            "lower train.keep_checkpoints"
        )
    return line
