"""Read rows from files, folders, globs and hub ids, each with its file and number."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config.sources import Source, SourceSection, path_of
from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_batches
from tunesmith.sources.containers import read_file
from tunesmith.sources.datafile import Meter, container_of
from tunesmith.sources.dataset_info import Entry, convert_rows, find_entry, list_entries
from tunesmith.sources.folders import has_card_with_configs, pick_data_files, read_folder, refuse_broken_link
from tunesmith.sources.jsonfile import JsonLine
from tunesmith.sources.names import IN_MEMORY, name_row
from tunesmith.sources.rowsize import DEFAULT_MAX_ROW_MB

_AMOUNT = re.compile(r"\b(weight|epochs|limit)\W{0,3}[=:]|:(0?\.\d+|[\d.]+%)$")  # chats.jsonl:weight=0.3
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.+-]+(?:\[[\d%:-]*\])?))?")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as in the file, or as converted by an entry of dataset_info.json.

    `number` is 1-based: the first line of a JSON Lines or CSV row, else the item; of rows given in Python it is their
    index, from 0. `value` is a RowTooLarge where the
    row is larger than data.max_row_mb, and a JsonLine where it is not parsed yet.
    """

    file: str
    number: int
    value: Any

    @property
    def where(self) -> str:
        return name_row(self.file, self.number)

    def parsed(self) -> RawRow:
        """The row with its value parsed.

        Raises:
            DataError: its JSON is broken.
        """
        return RawRow(self.file, self.number, self.value.parse()) if isinstance(self.value, JsonLine) else self


@dataclass(frozen=True, slots=True)
class Part:
    """The files and hub data sets of one name, or of one source of a mix.

    Attributes:
        files, hub: indices in the lists of `Sources`.
        limit: rows to read, the first ones; None: all.
    """

    files: range
    hub: range
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """What the names in data.train or data.eval refer to.

    Attributes:
        files: files to read, in order.
        hub: (path or id, config, split) for `datasets`, read after the files.
        entries: index in `files` -> entry of dataset_info.json that says how to read the file.
        hub_entries: the same for `hub`.
        passed_over: contents of a folder that are not read: other splits, pictures, licences, unsearched subfolders.
        names: file -> the name of its rows, where that is not its path (rows given in Python).
        parts: what belongs to each name, in order; empty for rows given in Python.
    """

    files: list[Path] = field(default_factory=list)
    hub: list[tuple[str, str | None, str]] = field(default_factory=list)
    entries: dict[int, Entry] = field(default_factory=dict)
    hub_entries: dict[int, Entry] = field(default_factory=dict)
    passed_over: list[Path] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        """What the rows of a file are named after: its entry in `names`, else its path."""
        return self.names.get(path, str(path))

    def row_files(self, part: Part) -> list[str]:
        """What the rows of a part name as their files."""
        files = [self.name_of(self.files[index]) for index in part.files]
        return [*files, *map(self.row_file, part.hub)]

    def row_file(self, number: int) -> str:
        """What the rows of a hub data set name as their file."""
        hub_id, _, split = self.hub[number]
        return f"{hub_id}:{split}"


def find_sources(names: Iterable[Source]) -> Sources:
    """Resolve every name before any row is read.

    Raises:
        DataError: a name refers to nothing; the message offers similar names.
    """
    sources = Sources()
    for item in names:
        num_files, num_hub = len(sources.files), len(sources.hub)
        _add_name(path_of(item), sources)
        limit = item.limit if isinstance(item, SourceSection) else None
        part = Part(range(num_files, len(sources.files)), range(num_hub, len(sources.hub)), limit)
        sources.parts.append(part)
    return sources


def _add_name(name: str, sources: Sources) -> None:
    if not name.strip():
        raise DataError(
            "the data name is empty. Give a file, a folder, a pattern or a hub id (owner/name).", code="empty-name"
        )
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        _add_folder(path, None, None, sources)
    elif path.exists() or path.is_symlink():
        sources.files.append(refuse_broken_link(path))
    elif in_folder := _split_of_folder(name):
        _add_folder(*in_folder, sources)
    elif any(mark in name for mark in "*?[") and not _HUB_ID.fullmatch(name):  # owner/name:train[:100] is a hub id
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if not p.is_dir())
        if not found:
            raise DataError(
                f"{name}: no file matches this pattern. Check the folder and the suffix.",
                code="pattern-without-match",
            )
        sources.files.extend(refuse_broken_link(p) for p in found)
    else:
        hub = _HUB_ID.fullmatch(name)
        if not hub or _looks_like_path(name):
            raise DataError(f"{name}: no such file or folder.{_advise(name, path)}", code="file-not-found")
        sources.hub.append((hub["id"], hub["config"], hub["split"] or "train"))


def _advise(name: str, path: Path) -> str:
    if _AMOUNT.search(name):
        return " A source with a weight, epochs or a limit is written in a YAML run file or as tunesmith.Source."
    return f"{_similar(path)} Hub data sets are named owner/name."


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or container_of(Path(name)) is not None or Path(name).parent.is_dir()


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _split_of_folder(name: str) -> tuple[Path, str | None, str] | None:
    """Folder, config and split of "folder:split" or "folder:config:split", where there is such a folder."""
    head, _, split = name.rpartition(":")
    folder, _, config = head.rpartition(":")
    for path, chosen in ((head, None), (folder, config)):
        if path and split and Path(os.path.expanduser(path)).is_dir():
            return Path(os.path.expanduser(path)), chosen, split
    return None


def _add_folder(folder: Path, config: str | None, split: str | None, sources: Sources) -> None:
    """`split` may also be the name of a data set in the folder's dataset_info.json."""
    entries = list_entries(folder)
    if split in entries and config is None:
        _add_entry(folder, find_entry(folder, split), sources)
    elif has_card_with_configs(folder):
        sources.hub.append((str(folder), config, split or "train"))
    elif config is not None:
        raise DataError(
            f"{folder}: has no config {config!r}: it has no README.md with configs. Write {folder}:{split}.",
            code="config-not-found",
        )
    elif entries:
        _add_entry(folder, find_entry(folder, split), sources)
    else:
        files, passed_over = read_folder(folder, split)
        sources.files.extend(files)
        sources.passed_over.extend(passed_over)


def _add_entry(folder: Path, entry: Entry, sources: Sources) -> None:
    if entry.hub is not None:
        sources.hub_entries[len(sources.hub)] = entry
        sources.hub.append(entry.hub)
        return
    path = folder / entry.file_name
    if path.is_dir():
        files = pick_data_files(sorted(path.iterdir()))
    else:
        files = [path] if path.exists() or path.is_symlink() else []
    if not files:
        raise DataError(
            f"{entry.where}: no such file or folder: {path}.{_similar(path)} Correct file_name, or add the file.",
            code="file-not-found",
        )
    for file in files:
        sources.entries[len(sources.files)] = entry
        sources.files.append(refuse_broken_link(file))


def read_rows(
    sources: Sources,
    encoding: str = "utf-8",
    max_row_mb: float = DEFAULT_MAX_ROW_MB,
    parses: bool = True,
    meter: Meter | None = None,
) -> Iterator[RawRow]:
    """Every row in order.

    Args:
        sources: from find_sources.
        encoding: of text files (data.encoding).
        max_row_mb: the value of a larger row is a RowTooLarge (data.max_row_mb).
        parses: off: lines of JSON may be left to `RawRow.parsed`, which another process can call.
        meter: told what has been read.

    Raises:
        DataError: a file is unreadable, empty, broken or of an unknown kind.
    """
    if not any(part.limit for part in sources.parts):
        yield from _read_files(sources, range(len(sources.files)), encoding, max_row_mb, parses, meter)
        yield from _read_hubs(sources, range(len(sources.hub)), max_row_mb)
        return
    for part in sources.parts:  # each has files or hub data sets, not both
        yield from islice(_read_files(sources, part.files, encoding, max_row_mb, parses, meter), part.limit)
    for part in sources.parts:
        yield from islice(_read_hubs(sources, part.hub, max_row_mb), part.limit)


def _read_files(
    sources: Sources, places: range, encoding: str, max_row_mb: float, parses: bool, meter: Meter | None
) -> Iterator[RawRow]:
    for place in places:
        path = sources.files[place]
        entry, name = sources.entries.get(place), sources.name_of(path)
        first = 0 if name in IN_MEMORY else 1
        rows = read_file(path, encoding, max_row_mb, parses or entry is not None, meter)
        for number, value in convert_rows(rows, entry) if entry else rows:
            yield RawRow(name, number - 1 + first, value)
        if meter is not None:
            meter.finish_file(path.stat().st_size)


def _read_hubs(sources: Sources, places: range, max_row_mb: float) -> Iterator[RawRow]:
    for place in places:
        hub_id, config, split = sources.hub[place]
        entry = sources.hub_entries.get(place)
        rows = _read_hub(hub_id, config, split, max_row_mb)
        for number, value in convert_rows(rows, entry) if entry else rows:
            yield RawRow(sources.row_file(place), number, value)


def _read_hub(hub_id: str, config: str | None, split: str, max_row_mb: float) -> Iterator[tuple[int, Any]]:
    """Rows of a hub data set, or of a folder laid out like one, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # datasets raises many classes; the first line of the message says why
        raise explain_hub(hub_id, split, error) from None
    yield from read_batches(f"{hub_id}:{split}", rows.with_format("arrow").iter(batch_size=1024), max_row_mb)


def explain_hub(hub_id: str, split: str, error: Exception) -> DataError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "gated" in first.lower():
        return DataError(
            f"{hub_id}: is a gated data set. Accept its terms on its page, then log in with: hf auth login",
            code="hub-gated",
        )
    if "Config name is missing" in first:
        return DataError(f"{hub_id}: {first} Name one as {hub_id}:CONFIG:{split}", code="hub-config-missing")
    if "split" in first.lower():
        return DataError(f"{hub_id}: {first} Name one as {hub_id}:SPLIT", code="hub-split-missing")
    if Path(hub_id).is_dir():
        return DataError(
            f"{hub_id}: cannot be read as a data set folder: {first} Check the folder's README.md and its files.",
            code="folder-unreadable",
        )
    return DataError(
        f"{hub_id}: not a local file or folder, and loading it from the hub failed: {first}\n"
        "Check the name and the network; for a private data set, log in with: hf auth login",
        code="hub-unreachable",
    )
