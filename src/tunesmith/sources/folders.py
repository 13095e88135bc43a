"""Find the data files of a folder: splits, hub layouts, and folders written by `datasets.save_to_disk`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.reading import read_text
from tunesmith.runfolder import RunFolder, has_stages
from tunesmith.sources.datafile import SUFFIXES, container_of

TEXT_SUFFIXES = (".txt", ".md")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SPLIT_WORD = re.compile(rf"(?:^|[-_. \d])({'|'.join(_SPLITS)})(?:[-_. \d]|$)")
_ABOUT_DATA = ("README", "LICENSE", "LICENCE", "CHANGELOG", "REQUIREMENTS")
LEDGER_SUFFIX = ".ledger.json"  # what generate writes about answers, beside them


def read_folder(folder: Path, split: str | None) -> tuple[list[Path], list[Path]]:
    """Files to read, and the other files of the folder.

    Raises:
        DataError: the folder has no data or no such split, or only evaluation splits and none was named.
    """
    if is_run(folder):
        raise DataError(
            f"{folder}: is a tunesmith run, not data. Give the files or the folder that it was trained on.",
            code="run-as-data",
        )
    saved = _saved_files(folder)
    if saved is not None:
        chosen = _choose_split(saved, folder, split)
        return chosen, sorted({*saved} - {*chosen})
    files, subfolders = _list_folder(folder)
    data = pick_data_files(files)
    if not data:
        names = ", ".join(path.name for path in subfolders[:4])
        hint = f" Subfolders ({names}) are not searched: name them, or {folder}/**/*.jsonl." if names else ""
        raise DataError(
            f"{folder}: the folder has no data file ({', '.join(SUFFIXES)}, plain or .gz).{hint}",
            code="folder-without-data",
        )
    chosen = [refuse_broken_link(path) for path in _choose_split(data, folder, split)]
    return chosen, sorted({*files, *subfolders} - {*chosen})


def refuse_broken_link(path: Path) -> Path:
    if not path.exists():
        raise DataError(
            f"{path}: is a link to {os.readlink(path)}, which does not exist. Correct or remove the link.",
            code="broken-link",
        )
    return path


def has_card_with_configs(folder: Path) -> bool:
    """Whether the folder is a clone of a hub data set whose README lists configs, which `datasets` reads."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    return head.startswith("---") and bool(re.search(r"^configs:", head, re.MULTILINE))


def _saved_files(folder: Path) -> list[Path] | None:
    """All shards of a Dataset or DatasetDict written by `datasets.save_to_disk`; None for other folders."""
    splits = load_object(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        parts = [folder / str(name) for name in splits]
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        parts = [folder]
    else:
        return None
    files = []
    for part in parts:
        shards = load_object(part / "state.json").get("_data_files")
        names = (
            [shard.get("filename") for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
        )
        if part == folder and not names:
            return None
        files += [part / name for name in names if isinstance(name, str)]
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        what = missing[0] if missing else folder / "state.json"
        raise DataError(
            f"{what}: missing or empty in a folder written by save_to_disk. Copy the folder again.",
            code="saved-dataset-incomplete",
        )
    return files


def load_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; empty where there is none."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_run(folder: Path) -> bool:
    """Whether a folder is a RUN, written by `train --output`."""
    run = RunFolder(folder)
    return has_stages(folder) or all(path.is_file() for path in (run.record, run.ledger, run.config))


def _list_folder(folder: Path, depth: int = 0) -> tuple[list[Path], list[Path]]:
    """Files of a folder and of its layout (data/, train/, data/train/); and the other subfolders."""
    files, subfolders = [], []
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
            elif is_run(path):
                subfolders.append(path)  # its metrics and ledger are JSON but not data
            elif depth < 2 and (path.name.lower() == "data" or _SPLIT_WORD.search(path.name.lower())):
                files_below, subfolders_below = _list_folder(path, depth + 1)
                files += files_below
                subfolders += subfolders_below
            else:
                subfolders.append(path)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read: {error.strerror}. Check the folder's permissions.", code="folder-unreadable"
        ) from None
    return files, subfolders


def pick_data_files(files: list[Path]) -> list[Path]:
    """Data files of a list; text files count only where there are no others (next to rows they are notes)."""
    data = [
        p
        for p in files
        if container_of(p)
        and (p.is_file() or p.is_symlink())
        and not p.name.upper().startswith(_ABOUT_DATA)
        and not p.name.endswith(LEDGER_SUFFIX)
    ]
    return [p for p in data if container_of(p) not in TEXT_SUFFIXES] or data


def _choose_split(files: list[Path], folder: Path, split: str | None) -> list[Path]:
    """Files of the given split; without one, all files that are not named as an evaluation split."""
    named = [path for path in files if split is not None and path.relative_to(folder).parts[:-1] == (split,)]
    if named:
        return named
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_named_by(path.relative_to(folder)), []).append(path)
    names = ", ".join(sorted(name for name in splits if name))
    if split is not None:
        chosen = splits.get(_SPLITS.get(split.lower(), split))
        if not chosen:
            raise DataError(
                f"{folder}: no file of split {split!r}. Splits found: {names or 'none'}.", code="split-not-found"
            )
        return chosen
    if len(splits) == 1 or splits.keys() == {"train", None}:
        return files
    chosen = splits.get("train") or splits.get(None)
    if not chosen:
        example = next(iter(splits))
        raise DataError(
            f"{folder}: has only the splits {names}. Name the one to read, as in {folder}:{example}.",
            code="split-not-named",
        )
    return chosen


def _split_named_by(path: Path) -> str | None:
    """The split in the name of a file or of a folder above it; the outermost folder wins."""
    words = (_SPLIT_WORD.search(part.lower()) for part in path.parts)
    return next((_SPLITS[word[1]] for word in words if word), None)


def matches_pattern(path: Path, pattern: str) -> bool:
    """Whether a pattern with *, ? or [ would find a file, which need not exist yet.

    Args:
        path: absolute, without links.
    """
    if not any(mark in pattern for mark in "*?["):
        return False
    whole = Path(os.path.abspath(os.path.expanduser(pattern))).parts
    plain = next((place for place, part in enumerate(whole) if any(mark in part for mark in "*?[")), len(whole))
    folder = Path(*whole[:plain]).resolve()
    return path.is_relative_to(folder) and _match_parts(path.relative_to(folder).parts, whole[plain:])


def _match_parts(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":  # no folder or more, or at the end everything
        below = any(_match_parts(parts[start:], patterns[1:]) for start in range(len(parts)))
        return below or len(patterns) == 1
    return fnmatchcase(parts[0], patterns[0]) and _match_parts(parts[1:], patterns[1:])
