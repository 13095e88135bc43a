"""Where a merged model may be written: a new or empty folder that can take its name, and none that a run owns."""

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
    """The real path of a folder to make.

    Raises:
        TunesmithError: it exists, or cannot be made there.
    """
    shown = output if len(output) <= 80 else f"{output[:80]}..."
    try:
        output.encode("utf-8")
        folder = Path(output).expanduser().resolve()
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise TunesmithError(f"{shown}: exists already; give --output a new folder.")
        parent = next(path for path in folder.parents if path.exists())
    except UnicodeEncodeError:
        raise TunesmithError(f"{shown!r}: is not UTF-8; give --output a name that is.") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~somebody without a home
        reason = getattr(error, "strerror", None) or error
        raise TunesmithError(f"{shown}: cannot be used as --output: {reason}.") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise TunesmithError(f"{shown}: cannot be used as --output: {parent} {what}.")
    _require_no_model_around(folder, shown)
    _try_name(folder, parent, shown)
    return folder


def _require_no_model_around(folder: Path, shown: str) -> None:
    """A run replaces its adapter/, model/ and checkpoints/ whole, with everything that lies in them."""
    for path in (folder, *folder.parents):
        if path.name in SUBFOLDERS and (path.parent / RUN_FILE).exists():
            raise TunesmithError(
                f"{shown}: lies in {path}, which the run replaces as a whole when it goes on. Give --output a folder "
                "outside it."
            )


def _try_name(folder: Path, parent: Path, shown: str) -> None:
    """What the end will do, before any work: a folder of the longest name that is needed, and a rename.

    Raises:
        TunesmithError: a mount point, which cannot be renamed; a file system such as /proc, which takes no folders.
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
            raise RunError(f"{shown}: no room left on the disk.") from None
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise TunesmithError(
                f"{shown}: is a mount point, and the merged model takes its name by a rename at the end, which a mount "
                f"point does not allow. Give --output a folder in it: {shown.rstrip('/')}/merged"
            ) from None
        raise TunesmithError(f"{shown}: cannot be used as --output: {error.strerror}.") from None


def is_ours(name: Any, folder: Path) -> bool:
    """Whether an error is about what we write, not about the base."""
    paths = (Path(str(name)), *Path(str(name)).parents)
    return any(
        path == folder or (path.parent == folder.parent and path.name.startswith(f".{folder.name}.")) for path in paths
    )
