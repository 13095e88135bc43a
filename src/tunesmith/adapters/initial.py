"""RUN/adapter_init: the first matrices of PiSSA and OLoRA, needed to convert the finished adapter.

Changed matrices would give another adapter than the trained one, unnoticed, so run.json has their hashes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter import save_initial
from tunesmith.errors import RunError, TunesmithError
from tunesmith.files import sha256_file
from tunesmith.runfolder import RunFolder

Hashes = Mapping[str, str]


def keep_initial(adapter: Any, run: RunFolder) -> dict[str, str]:
    """Write the folder; SHA-256 of its files."""
    save_initial(adapter, run.initial_adapter)
    return hash_initial(run)


def hash_initial(run: RunFolder) -> dict[str, str]:
    """SHA-256 of the matrices that are there now; peft rewrites the config beside them when it converts."""
    folder = run.initial_adapter
    try:
        if any(path.is_symlink() or not path.is_file() for path in folder.iterdir()):  # peft would write through a link
            return {}
        return {path.name: sha256_file(path) for path in folder.glob("*.safetensors")} if folder.is_dir() else {}
    except OSError:  # what cannot be read is not what was written
        return {}


def is_initial_whole(run: RunFolder, recorded: Hashes | None) -> bool:
    """Runs of earlier versions have no hashes; there the folder must at least exist."""
    now = hash_initial(run)
    return bool(now) and (recorded is None or recorded == now)


def require_initial(run: RunFolder, recorded: Hashes | None) -> Path:
    """The folder, unchanged.

    Args:
        recorded: in run.json.

    Raises:
        RunError: it was changed or removed while the run trained; resume writes it again.
    """
    if not is_initial_whole(run, recorded):
        raise RunError(
            f"{run.initial_adapter}: was changed or removed since the run began; the adapter is not written.",
            code="adapter-init-changed",
        )
    return run.initial_adapter


def restore_initial(adapter: Any, run: RunFolder, recorded: Hashes | None) -> str:
    """Write a damaged folder again from an adapter that is as it was at step 0; a remark where that was needed.

    Raises:
        TunesmithError: what comes out is not what the run began with.
    """
    folder = run.initial_adapter
    if is_initial_whole(run, recorded):
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    made = keep_initial(adapter, run)
    if recorded != made:
        shutil.rmtree(folder, ignore_errors=True)
        raise TunesmithError(
            f"{folder}: was changed or removed, and writing it again gives other values (other base, seed or "
            "versions). Restore it from a copy, or start a new run.",
            code="adapter-init-changed",
        )
    return f"{folder.name}: was changed or removed; made again, equal to what the run began with"
