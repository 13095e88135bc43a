"""RUN/adapter_init: the first matrices of PiSSA and OLoRA, which the finished adapter is converted with.

Changed matrices would make another adapter than was trained, and nothing else could tell. So run.json has their
hashes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter import save_initial
from tunesmith.errors import RunError, TunesmithError
from tunesmith.files import sha256_file

INITIAL = "adapter_init"


def keep_initial(adapter: Any, run: Path) -> dict[str, str]:
    """Write the folder; SHA-256 of its files."""
    save_initial(adapter, run / INITIAL)
    return hash_initial(run)


def hash_initial(run: Path) -> dict[str, str]:
    """SHA-256 of the matrices that lie there now; peft writes the config beside them anew when it converts."""
    folder = run / INITIAL
    try:
        if any(path.is_symlink() or not path.is_file() for path in folder.iterdir()):  # peft would write through a link
            return {}
        return {path.name: sha256_file(path) for path in folder.glob("*.safetensors")} if folder.is_dir() else {}
    except OSError:  # what cannot be read is not what was written
        return {}


def is_initial_whole(run: Path, facts_of_run: Mapping[str, Any]) -> bool:
    """Runs of earlier versions have no hashes; there the folder must at least be."""
    now = hash_initial(run)
    return bool(now) and facts_of_run.get(INITIAL, now) == now


def require_initial(run: Path, facts_of_run: Mapping[str, Any]) -> Path:
    """The folder, unchanged.

    Raises:
        RunError: it was changed or removed while the run trained; resume makes it anew.
    """
    if not is_initial_whole(run, facts_of_run):
        raise RunError(f"{run / INITIAL}: was changed or removed since the run began; the adapter is not written.")
    return run / INITIAL


def restore_initial(adapter: Any, run: Path, facts_of_run: Mapping[str, Any]) -> None:
    """Make a damaged folder anew from an adapter that has only just begun, as the run began.

    Raises:
        TunesmithError: what comes out is not what the run began with.
    """
    if is_initial_whole(run, facts_of_run):
        return
    shutil.rmtree(run / INITIAL, ignore_errors=True)
    made = keep_initial(adapter, run)
    if facts_of_run.get(INITIAL) != made:
        shutil.rmtree(run / INITIAL, ignore_errors=True)
        raise TunesmithError(
            f"{run / INITIAL}: was changed or removed, and cannot be made again as it was (other base, seed or "
            "versions). Put it back from a copy, or train anew."
        )
    print(f"{INITIAL}: was changed or removed; made again, equal to what the run began with")
