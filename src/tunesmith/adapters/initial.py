"""RUN/adapter_init: the initial matrices of PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).

They are needed to convert the finished adapter to a plain LoRA for the unchanged base (adapter.py).

run.json has their hashes: changed matrices would silently give a different adapter than the trained one.
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
    """Write the initial matrices; returns the SHA-256 of each file."""
    save_initial(adapter, run.initial_adapter)
    return hash_initial(run)


def hash_initial(run: RunFolder) -> dict[str, str]:
    """SHA-256 of the matrices found now; peft rewrites the config next to them when it converts."""
    folder = run.initial_adapter
    try:
        if any(path.is_symlink() or not path.is_file() for path in folder.iterdir()):  # peft would write through a link
            return {}
        return {path.name: sha256_file(path) for path in folder.glob("*.safetensors")} if folder.is_dir() else {}
    except OSError:  # an unreadable file counts as changed
        return {}


def is_initial_whole(run: RunFolder, recorded: Hashes | None) -> bool:
    """Whether the matrices are unchanged; runs of earlier versions have no hashes, so the folder need only exist."""
    now = hash_initial(run)
    return bool(now) and (recorded is None or recorded == now)


def require_initial(run: RunFolder, recorded: Hashes | None) -> Path:
    """The folder with the matrices, verified.

    Args:
        recorded: hashes in run.json.

    Raises:
        RunError: the folder was changed or removed during the run; resume restores it.
    """
    if not is_initial_whole(run, recorded):
        raise RunError(
            f"{run.initial_adapter}: was changed or removed since the run began, so the adapter was not written. "
            "Resume the run to restore it.",
            code="adapter-init-changed",
        )
    return run.initial_adapter


def restore_initial(adapter: Any, run: RunFolder, recorded: Hashes | None) -> str:
    """Write a damaged folder again from an adapter in its state at step 0; returns a remark if that was needed.

    Raises:
        TunesmithError: the matrices differ from those at the start of the run.
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
    return f"{folder.name}: was changed or removed; restored with the same values"
