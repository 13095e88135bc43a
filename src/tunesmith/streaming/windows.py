"""Windows: consecutive rows, labelled into a small token store, whose samples are then shuffled and packed together."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.plans.packing import WINDOW, pack_lengths
from tunesmith.sources.read import RawRow
from tunesmith.streaming.cursor import Cursor, Start
from tunesmith.streaming.job import Job
from tunesmith.streaming.ledger import load_ledger, save_ledger
from tunesmith.streaming.rows import count_sources, find_share, name_source, read_from

_FACTS = "window.json"
_PARTIAL = ".partial"
_JUDGED_ROWS = 1 << 16


def window_folder(folder: Path, number: int) -> Path:
    return folder / f"window-{number:06d}"


def remove_windows(folder: Path) -> None:
    """Delete all windows, also half-written ones: a resumed run labels its window again."""
    for path in folder.glob("window-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Window:
    """A window on disk.

    Attributes:
        start: the place before it.
        end: the place behind it, where the next window begins; its ledger counts this window.
        packs: sample numbers of the store, in training order.
    """

    store: TokenStore
    start: Start
    end: Start
    packs: list[npt.NDArray[np.int64]]

    def epochs_at(self, pack: int) -> float:
        """Epochs completed before a pack."""
        begin = self.start.epochs
        return begin + (self.end.epochs - begin) * pack / max(1, len(self.packs))


def is_whole(folder: Path, start: Start) -> bool:
    """Whether the window that begins at a place can be seen on this machine."""
    return (window_folder(folder, start.number) / _FACTS).is_file()


def open_window(folder: Path, start: Start, capacity: int, seed: int) -> Window:
    """Open the window that begins at a place, and pack it."""
    path = window_folder(folder, start.number)
    store = open_store(path)
    end = Start.from_json(json.loads((path / _FACTS).read_text(encoding="utf-8")))
    return Window(store, start, end, pack_window(store.lengths, capacity, [seed, start.epoch, start.number]))


def pack_window(lengths: npt.NDArray[np.int64], capacity: int, seed: list[int]) -> list[npt.NDArray[np.int64]]:
    """The packs of a window's samples, shuffled; equal arguments give equal packs."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    packs = []
    for first in range(0, len(order), WINDOW):
        part = order[first : first + WINDOW]
        packs += [part[pack] for pack in pack_lengths(lengths[part].tolist(), capacity)]
    return [packs[i] for i in rng.permutation(len(packs))]


class WindowWriter:
    """Label a stream into windows, one after another, from a place on.

    Attributes:
        start: the place before the next window.
    """

    def __init__(self, job: Job, encoder: Encoder) -> None:
        self.start = job.start
        self._job, self._encoder = job, encoder
        self._ledger = load_ledger(job.start.ledger)
        self._rows = self._label(job.start.cursor)
        self._held: list[tuple[LabelledRow, Cursor]] = []  # the next row, once it was asked for

    def write_next(self, folder: Path) -> None:
        """Write the next window.

        Raises:
            DataError: too many rows are refused or cut, a file has changed or is damaged, or no row can be used.
        """
        path = window_folder(folder, self.start.number)
        partial = path.with_name(path.name + _PARTIAL)
        with StoreWriter(partial) as writer:
            end = self._fill(writer)
        self._judge()
        (partial / _FACTS).write_text(json.dumps(end.to_json()), encoding="utf-8")
        partial.rename(path)
        self.start = end

    def _fill(self, writer: StoreWriter) -> Start:
        """Add rows until the window is full or the epoch ends; returns the place behind it."""
        start, size = self.start, self._job.size
        num_rows = num_samples = num_tokens = 0
        while True:
            for row, cursor in self._take():
                if start.epoch == 0:
                    self._ledger.add(row)
                writer.add(row)
                num_rows += 1
                if num_rows % _JUDGED_ROWS == 0:  # a window of bad rows would never be full
                    self._judge()
                num_samples += len(row.samples)
                num_tokens += sum(len(sample.input_ids) for sample in row.samples)
                if size.is_reached(num_samples, num_tokens) and self._has_more():
                    share = find_share(self._job.sources, cursor, self._job.data.limit)
                    return Start(start.number + 1, start.epoch, share, cursor, save_ledger(self._ledger))
            self._rows = self._label(Cursor())
            if num_samples:
                return Start(start.number + 1, start.epoch + 1, 0.0, Cursor(), save_ledger(self._ledger))
            self._judge()  # a whole epoch without a sample ends here
            start = replace(start, epoch=start.epoch + 1)

    def _take(self) -> Iterator[tuple[LabelledRow, Cursor]]:
        while self._has_more():
            yield self._held.pop()

    def _has_more(self) -> bool:
        """Whether the epoch has another row."""
        if not self._held:
            self._held += itertools.islice(self._rows, 1)
        return bool(self._held)

    def _judge(self) -> None:
        job = self._job
        self._ledger.raise_if_unusable(job.data.max_refused)
        self._ledger.raise_if_cut(job.data.max_cut_replies, job.max_seq_len)
        require_unchanged(job)

    def _label(self, cursor: Cursor) -> Iterator[tuple[LabelledRow, Cursor]]:
        """Labelled rows from a place on, each with the place behind it."""
        job = self._job
        behind: deque[Cursor] = deque()  # of rows that were read and not labelled yet

        def rows() -> Iterator[RawRow]:
            for row, place in read_from(job.sources, cursor, job.data):
                behind.append(place)
                yield row

        data = job.data.model_copy(update={"limit": None})  # `read_from` keeps it
        names = {name_source(job.sources, number) for number in range(count_sources(job.sources))}
        for row in label_rows(rows(), self._encoder, data, job.max_seq_len, draws=job.draws, known_files=names):
            yield row, behind.popleft()


def require_unchanged(job: Job) -> None:
    """Check that no file has changed since the run began or was resumed.

    Raises:
        DataError: one has.
    """
    for path, stamp in job.stamps:
        if take_stamp(path) != stamp:
            raise DataError(
                f"{path}: changed while it was read. Stop the program that writes to it, or train on a copy.",
                code="file-changed",
            )


def take_stamp(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns
