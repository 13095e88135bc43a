"""Replace a run's data set atomically: after a kill, either the old one or the new one is there."""

from __future__ import annotations

import json
import shutil

from tunesmith.files import sync_path, sync_tree
from tunesmith.reading import read_text
from tunesmith.runfolder import RunFolder

_NEW = ".data.new"  # complete, about to replace the old one


def replace_dataset(folder: RunFolder, staging: RunFolder) -> None:
    """Put stores and ledger of `staging`, a folder inside `folder`, in place of those of the run.

    The rename commits; the steps after it can be repeated by `finish_replacing`.
    """
    sync_tree(staging.path)
    staging.path.rename(folder.path / _NEW)
    sync_path(folder.path)
    finish_replacing(folder)


def finish_replacing(folder: RunFolder) -> None:
    """Complete a committed `replace_dataset`; does nothing if there is none."""
    new = RunFolder(folder.path / _NEW)
    if not new.path.is_dir():
        return
    if new.ledger.exists():  # moved last
        has_eval = json.loads(read_text(new.ledger))["eval"] is not None
        for store, target in ((new.tokens, folder.tokens), (new.eval_tokens, folder.eval_tokens)):
            if store.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                store.rename(target)
        if not has_eval:
            shutil.rmtree(folder.eval_tokens, ignore_errors=True)
        sync_path(folder.path)
        new.ledger.replace(folder.ledger)
    sync_path(folder.path)
    shutil.rmtree(new.path)
