"""Check where a merged model can be written: a new or empty folder outside of runs."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError, TunesmithError
from tunesmith.files import is_no_room
from tunesmith.runfolder import RUN_FILE, SUBFOLDERS


def resolve_target(output: str) -> Path:
    """The real path of a folder to create.

    Raises:
        TunesmithError: it exists already, or cannot be created.
    """
    shown = output if len(output) <= 80 else f"{output[:80]}..."
    try:
        output.encode("utf-8")
        folder = Path(output).expanduser().resolve()
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise TunesmithError(f"{shown}: already exists; give --output a new folder.", code="output-exists")
        parent = next(path for path in folder.parents if path.exists())
    except UnicodeEncodeError:
        raise TunesmithError(f"{shown!r}: is not UTF-8; give --output a UTF-8 name.", code="output-not-text") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: unknown user after ~
        reason = getattr(error, "strerror", None) or error
        raise TunesmithError(f"{shown}: cannot be used as --output: {reason}.", code="output-not-usable") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise TunesmithError(f"{shown}: cannot be used as --output: {parent} {what}.", code="output-not-usable")
    _require_no_model_around(folder, shown)
    _try_name(folder, parent, shown)
    return folder


def _require_no_model_around(folder: Path, shown: str) -> None:
    """Refuse a folder inside a run's adapter/, model/ or checkpoints/, which the run replaces."""
    for path in (folder, *folder.parents):
        if path.name in SUBFOLDERS and (path.parent / RUN_FILE).exists():
            raise TunesmithError(
                f"{shown}: is inside {path}, which resuming the run replaces. Give --output a folder outside of it.",
                code="output-in-run",
            )


def _try_name(folder: Path, parent: Path, shown: str) -> None:
    """Try the final rename before any work, with the longest name that will be used.

    Raises:
        TunesmithError: the folder is a mount point, which cannot be renamed, or on a file system such as /proc.
    """
    hidden = f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        if folder.exists():
            folder.rename(folder.with_name(hidden))
            folder.with_name(hidden).rename(folder)
        else:
            (parent / hidden).mkdir()
            (parent / hidden).rmdir()
    except OSError as error:
        if is_no_room(error):
            raise RunError(
                f"{shown}: no space left on the disk. Free space, or give --output on another disk.", code="disk-full"
            ) from None
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise TunesmithError(
                f"{shown}: is a mount point, which cannot be replaced by the merged model. Give --output a folder in "
                f"it: {shown.rstrip('/')}/merged",
                code="output-is-mount",
            ) from None
        raise TunesmithError(
            f"{shown}: cannot be used as --output: {error.strerror}.", code="output-not-usable"
        ) from None


def is_ours(name: Any, folder: Path) -> bool:
    """Whether an error is about the output, not the base."""
    paths = (Path(str(name)), *Path(str(name)).parents)
    return any(
        path == folder or (path.parent == folder.parent and path.name.startswith(f".{folder.name}.")) for path in paths
    )
