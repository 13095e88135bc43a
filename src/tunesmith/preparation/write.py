"""Prepare a run's data: label all rows into token stores, with a ledger of each row's outcome."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.data.dataset import Dataset, DataSources, split_dataset
from tunesmith.data.ledger import Ledger
from tunesmith.data.split import split_eval
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, RunError
from tunesmith.files import is_no_room
from tunesmith.plans.sources import files_of_sources
from tunesmith.preparation.cache import Entry, NoCache, cache_limit, open_entry, trim_cache
from tunesmith.preparation.chunks import chunk_rows
from tunesmith.preparation.fingerprint import fingerprint
from tunesmith.preparation.journal import Journal, ledger_from_saved, ledger_to_saved
from tunesmith.preparation.labelled import LabelRules, label_chunks, write_labelled
from tunesmith.runfolder import RunFolder
from tunesmith.sources.datafile import Meter
from tunesmith.sources.read import RawRow, Sources, read_rows

CACHED_BYTES = 32_000_000  # of data files, from which on data.cache auto keeps what is prepared
Takes = Callable[[RawRow], bool]


class Watcher(Protocol):
    """Shows how far the preparation is."""

    def preparing(self, rows: int, share: float | None) -> None:
        """Rows that are labelled, and the share of the data's bytes that has been read, where it is known."""

    def prepared(self) -> None:
        """No more rows are labelled, or an error ended that."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """One remark."""


class Unwatched:
    """Shows nothing."""

    def preparing(self, rows: int, share: float | None) -> None:
        pass

    def prepared(self) -> None:
        pass

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def write_dataset(
    data: DataSection,
    sources: DataSources,
    encoder: Encoder,
    max_seq_len: int,
    seed: int,
    folder: RunFolder,
    watcher: Watcher | None = None,
) -> Dataset:
    """Label all rows into stores in `folder`.

    What is drawn for rows (data.system_prompts, data.empty_think_share) changes training rows only. Rows that
    data.eval_split holds out are labelled once more, as they are in the data.

    Where several processes train together, one of them calls this, and the others wait until it has returned and the
    folder has its final name; then they call `open_dataset` with the hashes of `Dataset.sha256` and both ledgers. The
    stores are only read after that.

    Args:
        seed: for data.eval_split and the draws.

    Raises:
        DataError: too many rows are refused, or a file changed while it was read.
        RunError: a worker was killed.
    """
    watcher = watcher or Unwatched()
    draws = RowDraws.of(data, seed)
    rules = LabelRules(encoder, data, max_seq_len, draws)
    store, ledger, hashes = _label_into(_Rows(sources.train, rules), folder.tokens, watcher)
    ledger.sources = {} if sources.train.names else files_of_sources(data.train, sources.train)
    held_out = _held_out_rows(store, data, seed) if draws and data.eval_split else None
    if not data.eval and held_out is None:
        return split_dataset(data, seed, store, ledger, None, None, {folder.tokens.name: hashes})
    found = replace(sources.train, passed_over=[]) if held_out else sources.eval
    unlimited = {} if held_out else {"limit": None}
    lenient = data.model_copy(update={**unlimited, "max_cut_replies": 1.0})  # nothing learns from these
    plain = LabelRules(encoder, lenient, max_seq_len)
    more = {"held_out": [data.eval_split, seed], "store": hashes} if held_out else None
    eval_store, eval_ledger, eval_hashes = _label_into(_Rows(found, plain, held_out, more), folder.eval_tokens, watcher)
    both = {folder.tokens.name: hashes, folder.eval_tokens.name: eval_hashes}
    return split_dataset(data, seed, store, ledger, eval_store, eval_ledger, both)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows to label.

    Attributes:
        takes: which rows of the sources; all by default.
        more: what decides that, as JSON.
    """

    sources: Sources
    rules: LabelRules
    takes: Takes | None = None
    more: Any = None


def _held_out_rows(store: TokenStore, data: DataSection, seed: int) -> Takes | None:
    """Whether a row is one that data.eval_split holds out; None where it holds out pieces of rows."""
    trained, held_out = split_eval(store, data.eval_split, seed)
    rows = store.row_ids
    if np.isin(rows[held_out], rows[trained]).any():
        return None
    numbers_of = {
        name: np.unique(store.row_numbers[held_out[store.file_numbers[held_out] == number]])
        for number, name in enumerate(store.files)
    }

    def takes(row: RawRow) -> bool:
        numbers = numbers_of.get(row.file)
        if numbers is None or not len(numbers):
            return False
        place = int(np.searchsorted(numbers, row.number))
        return place < len(numbers) and int(numbers[place]) == row.number

    return takes


Labelled = tuple[TokenStore, Ledger, dict[str, str]]  # a store, its ledger and the hashes of its files


def _label_into(given: _Rows, folder: Path, watcher: Watcher) -> Labelled:
    """Label rows into a store in `folder`, or take it from the cache."""
    data, sources = given.rules.data, given.sources
    sha256, ledger = None, Ledger()
    if _is_worth_keeping(data, sources):
        before = _stamps(sources.files)
        key = fingerprint(sources, given.rules, given.more)
        try:
            if key is not None:
                sha256, ledger = _from_cache(key, given, before, folder, watcher)
        except NoCache as error:
            watcher.note(f"note: prepared data are not kept: {error}")
    if sha256 is None:
        before = _stamps(sources.files)
        writer = StoreWriter(folder)
        with writer:
            for recent in _label(given, writer, 0, folder.parent, watcher):
                ledger.merge(recent)
        refuse_changed(sources.files, before)
        sha256 = writer.sha256
    ledger.passed_over = [str(path) for path in sources.passed_over]
    ledger.raise_if_unusable(data.max_refused)
    ledger.raise_if_cut(data.max_cut_replies, given.rules.max_seq_len)
    return open_store(folder), ledger, sha256


def _is_worth_keeping(data: DataSection, sources: Sources) -> bool:
    """Whether the cache may hold the store: data.cache, by default for large files."""
    if data.cache != "auto":
        return data.cache
    return sum(path.stat().st_size for path in sources.files if path.exists()) >= CACHED_BYTES


def _from_cache(
    key: str, given: _Rows, before: Stamps, folder: Path, watcher: Watcher
) -> tuple[dict[str, str], Ledger]:
    """A store prepared earlier, or prepared now and kept; a preparation that was killed continues."""
    limit = cache_limit()
    with open_entry(key, lambda text: watcher.note(f"note: {text}")) as entry:
        found = None
        try:
            found = entry.read()
        except ValueError as error:
            watcher.note(f"note: prepared data in {entry.folder}: {error}; preparing the data again")
            entry.clear()
        if found is not None:
            sha256, ledger = found[0], ledger_from_saved(found[1])
            watcher.note(f"note: data prepared earlier: {ledger.rows:,} rows ({entry.folder})")
        else:
            with _explained_room(entry):
                sha256, ledger = _prepare(entry, given, before, watcher)
                entry.complete(sha256, ledger_to_saved(ledger))
        entry.hand_over(folder, sha256)
    if found is None:
        trim_cache(limit, key)
    return sha256, ledger


@contextlib.contextmanager
def _explained_room(entry: Entry) -> Iterator[None]:
    """Name the cache folder where its disk is full.

    Raises:
        RunError: it is.
    """
    try:
        yield
    except OSError as error:
        if not is_no_room(error):
            raise
        raise RunError(
            f"{entry.folder}: the disk is full. Free space there; the same command then continues where it stopped. Or "
            "set TUNESMITH_CACHE to a folder on another disk, or prepare into the run alone with --data.cache false.",
            code="disk-full",
        ) from None


def _prepare(entry: Entry, given: _Rows, before: Stamps, watcher: Watcher) -> tuple[dict[str, str], Ledger]:
    """Label all rows into the entry, with a commit now and then."""
    journal = Journal(entry.folder)
    try:
        writer, ledger = journal.open(entry.store)
    except (OSError, ValueError) as error:
        watcher.note(f"note: an earlier preparation in {entry.folder} cannot be continued ({error}); starting over")
        entry.clear()
        writer, ledger = journal.open(entry.store)
    if journal.rows:
        watcher.note(f"note: continuing a preparation that was interrupted, after row {journal.rows:,}")
    recent = Ledger()
    try:
        with writer:
            for counted in _label(given, writer, journal.rows, entry.folder, watcher):
                recent.merge(counted)
                if journal.is_due:
                    journal.commit(writer, recent)
                    ledger.merge(recent)
                    recent = Ledger()
        refuse_changed(given.sources.files, before)
    except DataError:  # the same data would fail again
        entry.clear()
        raise
    except KeyboardInterrupt:
        if journal.rows:
            watcher.note(f"note: {journal.rows:,} rows are prepared and kept; the same command continues there")
        raise
    ledger.merge(recent)
    journal.remove()
    return writer.sha256, ledger


def _label(given: _Rows, writer: StoreWriter, skip: int, folder: Path, watcher: Watcher) -> Iterator[Ledger]:
    """Append the rows after the first `skip` to a store; yields the ledger of each chunk."""
    sources, data = given.sources, given.rules.data
    meter = Meter()
    rows: Iterator[RawRow] = read_rows(sources, data.encoding, data.max_row_mb, parses=False, meter=meter)
    rows = itertools.islice(rows, data.limit) if data.limit else rows
    if given.takes is not None:
        rows = filter(given.takes, rows)
    total = 0 if sources.hub else sum(path.stat().st_size for path in sources.files)
    done = skip
    with contextlib.closing(label_chunks(chunk_rows(rows, skip), given.rules, folder)) as chunks:
        try:
            for labelled in chunks:
                ledger = Ledger()
                write_labelled(labelled, writer, ledger)
                done += ledger.rows
                watcher.preparing(done, meter.bytes_read / total if total else None)
                yield ledger
        finally:
            watcher.prepared()


Stamps = dict[Path, tuple[int, int] | None]


def _stamps(files: Sequence[Path]) -> Stamps:
    """Size and modification time of each file; None if it does not exist."""
    stats = ((path, path.stat()) if path.exists() else (path, None) for path in files)
    return {path: (stat.st_size, stat.st_mtime_ns) if stat else None for path, stat in stats}


def refuse_changed(files: Sequence[Path], before: Stamps) -> None:
    """Raises:
    DataError: a file is not as it was.
    """
    for path, stamp in _stamps(files).items():
        if stamp != before[path]:
            raise DataError(
                f"{path}: changed while it was read. Stop the program that writes to it, or train on a copy.",
                code="file-changed",
            )
