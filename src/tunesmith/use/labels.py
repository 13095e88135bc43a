"""Rows labelled for preview and check exactly as training labels them, and how a person names them."""

from __future__ import annotations

import datetime
import difflib
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import PreviewConfig
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.display import raw_stream
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, UsageError
from tunesmith.model.lengths import choose_lengths
from tunesmith.model.load import load_config
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.tokenizer import load_encoder
from tunesmith.sources.names import IN_MEMORY, name_row
from tunesmith.sources.read import RawRow, Sources, find_sources, read_rows

_ROWS = re.compile(r"(\d+)(?:-(\d+))?")
_INDEX = re.compile(rf"({'|'.join(IN_MEMORY)})\[(\d+)\]")
_LEFT_OUT = ("…/", ".../", "./")  # how a shortened path may begin
_LARGEST_ROW = 2**63


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows that a person asked for.

    Attributes:
        said: as it was typed.
        file: as typed; "" where only numbers were given.
        last: the last row, `first` where it is one row.
    """

    said: str
    file: str
    first: int
    last: int


@dataclass(slots=True)
class _Wanted:
    """The rows wanted of one file, and what was met while it was read."""

    ranges: list[RowRange] = field(default_factory=list)
    found: set[RowRange] = field(default_factory=set)
    before: dict[RowRange, int] = field(default_factory=dict)  # range -> the last row before it
    behind: dict[RowRange, int] = field(default_factory=dict)  # range -> the first row behind it

    @property
    def last(self) -> int:
        return max(one.last for one in self.ranges)

    def takes(self, number: int) -> bool:
        is_taken = False
        for one in self.ranges:
            if one.first <= number <= one.last:
                self.found.add(one)
                is_taken = True
            elif number < one.first:
                self.before[one] = number
            else:
                self.behind.setdefault(one, number)
        return is_taken


@dataclass(frozen=True, slots=True)
class LabelledData:
    """What a config says about labels, resolved: the sources, the encoder and the longest sample.

    Attributes:
        max_seq_len: in tokens.
        draws: what is drawn for rows of data.train.
    """

    data: DataSection
    train: Sources
    eval: Sources
    encoder: Encoder
    max_seq_len: int
    draws: RowDraws | None = None

    def rows(self, limit: int | None = None) -> Iterator[LabelledRow]:
        """The labelled rows of data.train; with `limit`, the first of them."""
        raw = itertools.islice(read_rows(self.train, self.data.encoding, self.data.max_row_mb), limit)
        return label_rows(raw, self.encoder, self.data, self.max_seq_len, draws=self.draws)

    def eval_rows(self) -> Iterator[LabelledRow]:
        """The labelled rows of data.eval, which data.limit does not cut."""
        return self._label(read_rows(self.eval, self.data.encoding, self.data.max_row_mb))

    def pick_rows(self, ranges: Sequence[RowRange]) -> Iterator[LabelledRow]:
        """The rows that were asked for, of data.train or data.eval, in the order of the data.

        Raises:
            DataError: a file is not among the data, or has no such row. It comes after the rows that were found.
        """
        wanted: dict[str, dict[str, _Wanted]] = {"train": self._find_wanted(ranges, self.train), "eval": {}}
        left = [one for one in ranges if not any(one in found.ranges for found in wanted["train"].values())]
        if left:
            wanted["eval"] = self._find_wanted(left, self.eval, is_last=True)
        parts = (("train", self.train, self.data.limit, self.draws), ("eval", self.eval, None, None))
        for part, sources, limit, draws in parts:
            if not wanted[part]:
                continue
            taken: set[tuple[str, int]] = set()
            raw = self._read_wanted(sources, wanted[part], limit, taken)
            yield from (row for row in self._label(raw, draws) if (row.file, row.number) in taken)
            self._require_found(wanted[part], limit)

    def _label(self, raw: Iterable[RawRow], draws: RowDraws | None = None) -> Iterator[LabelledRow]:
        data = self.data.model_copy(update={"limit": None})
        return label_rows(raw, self.encoder, data, self.max_seq_len, draws=draws)

    def _find_wanted(self, ranges: Sequence[RowRange], sources: Sources, is_last: bool = False) -> dict[str, _Wanted]:
        """File -> the rows wanted of it; a file that these sources do not have is an error in the last of them."""
        names, wanted = names_of(sources), dict[str, _Wanted]()
        for one in ranges:
            name = find_file(one, names)
            if name is not None and name not in IN_MEMORY and one.first == 0:
                raise _counted_from_1(one.said)
            if name is not None:
                wanted.setdefault(name, _Wanted()).ranges.append(one)
            elif is_last or (not self.eval.files and not self.eval.hub):
                raise _unknown_file(one, [*names_of(self.train), *names_of(self.eval)])
        return wanted

    def _read_wanted(
        self, sources: Sources, wanted: Mapping[str, _Wanted], limit: int | None, taken: set[tuple[str, int]]
    ) -> Iterator[RawRow]:
        """The wanted rows and the first row of each file, which says whether the file has a known format."""
        if limit is None:  # it counts the rows of all files
            sources = only_files(sources, set(wanted))
        waiting, seen = set(wanted), set[str]()
        for row in itertools.islice(read_rows(sources, self.data.encoding, self.data.max_row_mb), limit):
            asked = wanted.get(row.file)
            if asked is None:
                continue
            is_taken = asked.takes(row.number)
            if is_taken:
                taken.add((row.file, row.number))
            if is_taken or row.file not in seen:
                yield row
            seen.add(row.file)
            if row.number >= asked.last:
                waiting.discard(row.file)
                if not waiting:
                    return

    def _require_found(self, wanted: Mapping[str, _Wanted], limit: int | None) -> None:
        for name, asked in wanted.items():
            for one in asked.ranges:
                if one in asked.found:
                    continue
                before, behind = asked.before.get(one), asked.behind.get(one)
                if behind is not None:
                    near = f"are rows {before} and {behind}" if before else f"is row {behind}"
                    raise DataError(
                        f"row {one.said}: no row of {name} begins there; next to it {near}. A row is named by its "
                        "first line in JSON Lines and CSV files, and counted in others.",
                        code="row-not-found",
                    )
                if limit:
                    why = f"is not read: data.limit reads the first {limit:,} rows only. Raise it, or leave it out."
                else:
                    last = name_row(name, before or 0)
                    why = f"{name} ends before it. Give a row up to its last, {last}."
                raise DataError(f"row {one.said}: {why}", code="row-past-end")


def parse_rows(words: int | str | Iterable[object]) -> list[RowRange]:
    """Rows as a person names them, one or several: FILE:12, FILE:10-20, or the numbers alone.

    Raises:
        UsageError: a word names no row.
    """
    found = []
    several: Iterable[object] = [words] if isinstance(words, (int, str)) else words
    for word in several:
        said = f"{word.start}-{word.stop - 1}" if isinstance(word, range) and word.step == 1 else str(word)
        index = _INDEX.fullmatch(said)
        file, colon, numbers = (index[1], "", index[2]) if index else said.rpartition(":")
        match = _ROWS.fullmatch(numbers)
        if match is None or (colon and not file) or isinstance(word, bool):
            raise UsageError(
                f"row {said}: names no row. Give FILE:ROW or FILE:FIRST-LAST, as in chats.jsonl:12 or "
                "chats.jsonl:10-20.",
                code="row-value",
            )
        first = int(match[1][:20])
        last = int(match[2][:20]) if match[2] else first
        if first == 0 and file and file not in IN_MEMORY:
            raise _counted_from_1(said)
        if not first <= last < _LARGEST_ROW:
            why = "the first is behind the last" if last < first else "too large"
            raise UsageError(
                f"row {said}: names no row: {why}. Give FILE:ROW or FILE:FIRST-LAST, as in chats.jsonl:10-20.",
                code="row-value",
            )
        found.append(RowRange(said, file, first, last))
    return found


def _counted_from_1(said: str) -> UsageError:
    return UsageError(f"row {said}: rows of a file are counted from 1. Give FILE:1 for the first.", code="row-value")


def names_of(sources: Sources) -> list[str]:
    """What rows of these sources are named after, in order."""
    files = [sources.name_of(path) for path in sources.files]
    return list(dict.fromkeys([*files, *(f"{hub_id}:{split}" for hub_id, _, split in sources.hub)]))


def only_files(sources: Sources, names: set[str]) -> Sources:
    """The sources without the files that have other names."""
    files = [place for place, path in enumerate(sources.files) if sources.name_of(path) in names]
    hub = [place for place, (hub_id, _, split) in enumerate(sources.hub) if f"{hub_id}:{split}" in names]
    return replace(
        sources,
        files=[sources.files[place] for place in files],
        hub=[sources.hub[place] for place in hub],
        entries={new: sources.entries[old] for new, old in enumerate(files) if old in sources.entries},
        hub_entries={new: sources.hub_entries[old] for new, old in enumerate(hub) if old in sources.hub_entries},
    )


def find_file(asked: RowRange, names: Sequence[str]) -> str | None:
    """The file meant: by its name, its path, or the end of its path as check shortens it; None where there is none.

    Raises:
        DataError: several files are meant.
    """
    if not asked.file:
        found = list(names)
    elif asked.file in names:
        return asked.file
    else:
        path = os.path.realpath(os.path.expanduser(asked.file))
        found = [name for name in names if os.path.realpath(name) == path]
        end = asked.file
        for left_out in _LEFT_OUT:
            end = end.removeprefix(left_out)
        found = found or [name for name in names if f"/{name}".endswith(f"/{end}")]
    if len(found) > 1:
        listed = "\n".join(f"  {name}" for name in found[:10]) + ("\n  ..." if len(found) > 10 else "")
        raise DataError(
            f"row {asked.said}: {len(found)} files are possible:\n{listed}\n"
            f"Give FILE:ROW{' with more of the path' if asked.file else ''}.",
            code="row-file-ambiguous",
        )
    return found[0] if found else None


def _unknown_file(asked: RowRange, names: Sequence[str]) -> DataError:
    ends = {short: name for name, short in shorten_names(names).items()}
    base = os.path.basename(asked.file)
    close = difflib.get_close_matches(base, list(ends), n=1, cutoff=0.6) or difflib.get_close_matches(
        asked.file, list(names), n=1, cutoff=0.6
    )
    tail = asked.said.rpartition(":")[2]
    hint = f" Did you mean {close[0]}:{tail}?" if close else ""
    listed = ", ".join(list(ends)[:5]) + (" ..." if len(ends) > 5 else "")
    return DataError(
        f"row {asked.said}: {asked.file} is not among the data ({listed}).{hint} Give one of these files, or add the "
        "file with --data.",
        code="row-file-unknown",
    )


def shorten_names(names: Iterable[str]) -> dict[str, str]:
    """Each file -> the end of its path by which it is told from the others; `find_file` knows it again."""
    names = list(dict.fromkeys(names))
    parts = {name: [part for part in name.split("/") if part] or [name] for name in names}
    ends = Counter("/".join(parts[name][-count:]) for name in names for count in range(1, len(parts[name]) + 1))
    shortened = {}
    for name in names:
        own = ("/".join(parts[name][-count:]) for count in range(1, len(parts[name]) + 1))
        shortened[name] = next((end for end in own if ends[end] == 1), name)
    return shortened


def with_progress(rows: Iterable[LabelledRow]) -> Iterator[LabelledRow]:
    """The rows, counted on a terminal's last line."""
    console = Console(file=raw_stream(sys.stderr))
    if not console.is_terminal:
        yield from rows
        return
    columns = (TextColumn("reading"), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rows")
        shown = time.monotonic()
        for count, row in enumerate(rows, 1):
            yield row
            if time.monotonic() - shown > 0.2:
                progress.update(task, completed=count)
                shown = time.monotonic()


def open_data(config: PreviewConfig, sources: Mapping[str, Sources] | None = None) -> LabelledData:
    """Resolve a config as a run does, without its weights.

    Args:
        sources: "train" or "eval" -> sources that are resolved already, in place of the config's names.

    Raises:
        TunesmithError: the data, tokenizer, template or model config cannot be used.
    """
    data = config.data
    given = sources or {}
    train = given["train"] if "train" in given else find_sources(data.train)
    held_out = given["eval"] if "eval" in given else find_sources(data.eval or [])
    encoder = load_encoder(config.model, data, datetime.datetime.now())
    model_config = load_config(config.model, encoder.tokenizer)
    require_one_reading(config.model, encoder, model_config, config.lora.kind != "none")
    lengths = choose_lengths(model_config, data.max_seq_len, config.train.micro_batch_tokens)
    draws = RowDraws.of(data, config.train.seed)
    return LabelledData(data, train, held_out, encoder, lengths.max_seq_len, draws)
