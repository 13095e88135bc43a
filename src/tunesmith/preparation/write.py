"""Prepare a run's data: label all rows into token stores, with a ledger of each row's outcome."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.data.dataset import Dataset, DataSources, split_dataset
from tunesmith.data.ledger import Ledger
from tunesmith.data.split import split_eval
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.plans.sources import files_of_sources
from tunesmith.preparation.chunks import chunk_rows
from tunesmith.preparation.labelled import LabelRules, label_chunks, write_labelled
from tunesmith.runfolder import RunFolder
from tunesmith.sources.datafile import Meter
from tunesmith.sources.read import RawRow, Sources, read_rows

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
    store, ledger, hashes = _label_into(folder.tokens, sources.train, rules, watcher)
    ledger.sources = {} if sources.train.names else files_of_sources(data.train, sources.train)
    held_out = _held_out_rows(store, data, seed) if draws and data.eval_split else None
    if not data.eval and held_out is None:
        return split_dataset(data, seed, store, ledger, None, None, {folder.tokens.name: hashes})
    found = replace(sources.train, passed_over=[]) if held_out else sources.eval
    unlimited = {} if held_out else {"limit": None}
    lenient = data.model_copy(update={**unlimited, "max_cut_replies": 1.0})  # nothing learns from these
    eval_store, eval_ledger, eval_hashes = _label_into(
        folder.eval_tokens, found, LabelRules(encoder, lenient, max_seq_len), watcher, held_out
    )
    both = {folder.tokens.name: hashes, folder.eval_tokens.name: eval_hashes}
    return split_dataset(data, seed, store, ledger, eval_store, eval_ledger, both)


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


def _label_into(
    folder: Path, sources: Sources, rules: LabelRules, watcher: Watcher, takes: Takes | None = None
) -> tuple[TokenStore, Ledger, dict[str, str]]:
    """Label rows into a store; returns the store, the ledger and the hashes of its files."""
    data = rules.data
    before = _stamps(sources.files)
    ledger = Ledger(passed_over=[str(path) for path in sources.passed_over])
    meter = Meter()
    rows: Iterator[RawRow] = read_rows(sources, data.encoding, data.max_row_mb, parses=False, meter=meter)
    rows = itertools.islice(rows, data.limit) if data.limit else rows
    if takes is not None:
        rows = filter(takes, rows)
    total = 0 if sources.hub else sum(path.stat().st_size for path in sources.files)
    writer = StoreWriter(folder)
    with writer, contextlib.closing(label_chunks(chunk_rows(rows), rules, folder.parent)) as chunks:
        try:
            for labelled in chunks:
                write_labelled(labelled, writer, ledger)
                watcher.preparing(ledger.rows, meter.bytes_read / total if total else None)
        finally:
            watcher.prepared()
    ledger.raise_if_unusable(data.max_refused)
    ledger.raise_if_cut(data.max_cut_replies, rules.max_seq_len)
    for path, stamp in _stamps(sources.files).items():
        if stamp != before[path]:
            raise DataError(
                f"{path}: changed while it was read. Stop the program that writes to it, or train on a copy.",
                code="file-changed",
            )
    return open_store(folder), ledger, writer.sha256


def _stamps(files: Sequence[Path]) -> dict[Path, tuple[int, int] | None]:
    """Size and modification time of each file; None if it does not exist."""
    stats = ((path, path.stat()) if path.exists() else (path, None) for path in files)
    return {path: (stat.st_size, stat.st_mtime_ns) if stat else None for path, stat in stats}
