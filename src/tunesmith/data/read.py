"""Files, folders, globs and hub ids -> rows with their place."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.containers import SUFFIXES, TEXT_SUFFIXES, container_of, read_file
from tunesmith.errors import DataError

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.+-]+(?:\[[\d%:-]*\])?))?")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SPLIT_WORD = re.compile(rf"(?:^|[-_. \d])({'|'.join(_SPLITS)})(?:[-_. \d]|$)")
_ABOUT_DATA = ("README", "LICENSE", "LICENCE", "CHANGELOG", "REQUIREMENTS")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file holds it. `number` is 1-based: the first line of a JSON Lines or CSV row, else the item."""

    file: str
    number: int
    value: Any

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True, slots=True)
class Sources:
    """What the names given by a person stand for.

    Attributes:
        files: files to read, in order.
        hub: (path or id, config, split) for `datasets`, read after the files.
        passed_over: what a folder holds besides: other splits, pictures, licences, subfolders not looked into.
    """

    files: list[Path] = field(default_factory=list)
    hub: list[tuple[str, str | None, str]] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


def find_sources(names: Iterable[str]) -> Sources:
    """Look up every name before a row is read.

    Raises:
        DataError: a name stands for nothing; similar names nearby are offered.
    """
    sources = Sources()
    for name in names:
        if not name.strip():
            raise DataError("an empty data name. Give a file, a folder, a pattern or a hub id (owner/name).")
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            _add_folder(path, None, None, sources)
        elif path.exists() or path.is_symlink():
            sources.files.append(_refuse_broken_link(path))
        elif in_folder := _split_of_folder(name):
            _add_folder(*in_folder, sources)
        elif any(mark in name for mark in "*?[") and not _HUB_ID.fullmatch(name):  # owner/name:train[:100] is a hub id
            found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if not p.is_dir())
            if not found:
                raise DataError(f"{name}: no file matches this pattern. Check the folder and the ending.")
            sources.files.extend(_refuse_broken_link(p) for p in found)
        else:
            hub = _HUB_ID.fullmatch(name)
            if not hub or _looks_like_path(name):
                raise DataError(f"{name}: no such file or folder.{_similar(path)} A hub data set is named owner/name.")
            sources.hub.append((hub["id"], hub["config"], hub["split"] or "train"))
    return sources


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or container_of(Path(name)) is not None or Path(name).parent.is_dir()


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _refuse_broken_link(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: a link to {os.readlink(path)}, which does not exist. Mend or remove the link.")
    return path


def _split_of_folder(name: str) -> tuple[Path, str | None, str] | None:
    """Folder, config and split of "folder:split" or "folder:config:split", where there is such a folder."""
    head, _, split = name.rpartition(":")
    folder, _, config = head.rpartition(":")
    for path, chosen in ((head, None), (folder, config)):
        if path and split and Path(os.path.expanduser(path)).is_dir():
            return Path(os.path.expanduser(path)), chosen, split
    return None


def _add_folder(folder: Path, config: str | None, split: str | None, sources: Sources) -> None:
    if _has_card_with_configs(folder):
        sources.hub.append((str(folder), config, split or "train"))
        return
    if config is not None:
        raise DataError(f"{folder}: has no config {config!r}: no README.md in it lists any. Name it {folder}:{split}.")
    files, subfolders = _list_folder(folder)
    data = _data_files(files)
    if not data:
        names = ", ".join(path.name for path in subfolders[:4])
        hint = f" Its subfolders ({names}) are not looked into: name them, or {folder}/**/*.jsonl." if names else ""
        raise DataError(f"{folder}: the folder holds no data file ({', '.join(SUFFIXES)}, plain or .gz).{hint}")
    chosen = [_refuse_broken_link(path) for path in _choose_split(data, folder, split)]
    sources.files.extend(chosen)
    sources.passed_over.extend(sorted({*files, *subfolders} - {*chosen}))


def _has_card_with_configs(folder: Path) -> bool:
    """A clone of a hub data set whose README says which files are which; `datasets` obeys it."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    return head.startswith("---") and bool(re.search(r"^configs:", head, re.MULTILINE))


def _list_folder(folder: Path, depth: int = 0) -> tuple[list[Path], list[Path]]:
    """Files of a folder and of its layout (data/, train/, data/train/); and the other subfolders."""
    files, subfolders = [], []
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
            elif depth < 2 and (path.name.lower() == "data" or _SPLIT_WORD.search(path.name.lower())):
                files_below, subfolders_below = _list_folder(path, depth + 1)
                files += files_below
                subfolders += subfolders_below
            else:
                subfolders.append(path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from None
    return files, subfolders


def _data_files(files: list[Path]) -> list[Path]:
    """Texts are data only where there is nothing else: beside rows they are notes about them."""
    data = [
        p
        for p in files
        if container_of(p) and (p.is_file() or p.is_symlink()) and not p.name.upper().startswith(_ABOUT_DATA)
    ]
    return [p for p in data if container_of(p) not in TEXT_SUFFIXES] or data


def _choose_split(files: list[Path], folder: Path, split: str | None) -> list[Path]:
    """The files to read: those of the split asked for, else whatever no name holds back from training."""
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_named_by(path.relative_to(folder)), []).append(path)
    names = ", ".join(sorted(name for name in splits if name))
    if split is not None:
        chosen = splits.get(_SPLITS.get(split.lower(), split))
        if not chosen:
            raise DataError(f"{folder}: no file of the split {split!r}. Splits found: {names or 'none'}.")
        return chosen
    if len(splits) == 1 or splits.keys() == {"train", None}:
        return files
    chosen = splits.get("train") or splits.get(None)
    if not chosen:
        example = next(iter(splits))
        raise DataError(f"{folder}: holds only the splits {names}. Name the one to read, as in {folder}:{example}.")
    return chosen


def _split_named_by(path: Path) -> str | None:
    """The split that a file or one of the folders above it is named after; the outermost name counts."""
    words = (_SPLIT_WORD.search(part.lower()) for part in path.parts)
    return next((_SPLITS[word[1]] for word in words if word), None)


def read_rows(sources: Sources) -> Iterator[RawRow]:
    """Every row in order.

    Raises:
        DataError: a file that is unreadable, empty, broken or of unknown kind ends the reading at once.
    """
    for path in sources.files:
        for number, value in read_file(path):
            yield RawRow(str(path), number, value)
    for hub_id, config, split in sources.hub:
        yield from _read_hub(hub_id, config, split)


def _read_hub(hub_id: str, config: str | None, split: str) -> Iterator[RawRow]:
    """A data set of the hub, or a folder laid out like one, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    name = f"{hub_id}:{split}"
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the library raises a dozen kinds; its first line says which
        raise DataError(_explain_hub(hub_id, split, error)) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(name, number, value)


def _explain_hub(hub_id: str, split: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "gated" in first.lower():
        return f"{hub_id}: a gated data set. Accept its terms on its page, then log in with: hf auth login"
    if "Config name is missing" in first:
        return f"{hub_id}: {first} Name one as {hub_id}:CONFIG:{split}"
    if "split" in first.lower():
        return f"{hub_id}: {first} Name one as {hub_id}:SPLIT"
    if Path(hub_id).is_dir():
        return f"{hub_id}: cannot be read as a data set folder: {first}"
    return (
        f"{hub_id}: not a local file or folder, and the hub could not give it: {first}\n"
        "Check the name, the network, and for a private data set: hf auth login"
    )
