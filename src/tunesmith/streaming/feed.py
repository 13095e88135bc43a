"""Steps of a streamed run: windows are opened as they are reached, while the next ones are being prepared."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunesmith.data.feed import FIRST_PLACE, Batches, Pack, Place, Step
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import Ledger
from tunesmith.data.store import TokenStore
from tunesmith.display import format_count
from tunesmith.errors import DataError, RunError
from tunesmith.streaming.cursor import Start
from tunesmith.streaming.ledger import load_ledger
from tunesmith.streaming.preparer import Preparer
from tunesmith.streaming.windows import Window, is_whole, open_window, remove_windows, window_folder

_AHEAD = 2  # windows that are prepared beside the one that is trained on
_POLL_S = 0.2

Together = Callable[[Callable[[], bool]], bool]
"""Calls a function on the main process; all processes get its result, or its error."""


def call_here(function: Callable[[], bool]) -> bool:
    """`Together` of a run in one process."""
    return function()


def start_of(place: Place) -> tuple[Start, int]:
    """The place before a window, and the number of its pack where the next step begins."""
    if not isinstance(place, dict):
        return Start(), 0
    return Start.from_json(place), int(place["pack"])


@dataclass(frozen=True, slots=True, eq=False)
class StreamingFeed:
    """Take packs from one window after another.

    Every step has `packs_per_step` packs: at the end of a window, the last ones come from the next, also where that
    begins the next epoch.

    Attributes:
        folder: of the windows; shared by all processes.
        prepare: starts the labelling process at a place; called on the main process only.
        total_steps: train.max_steps.
        on_window: gets the ledger when a window is opened; called on the main process only.
        together: how the processes of the run wait for the main one.
        fill: share of the first window's packs that is not empty, where it is known.
    """

    folder: Path
    prepare: Callable[[Start], Preparer]
    capacity: int
    packs_per_step: int
    seed: int
    total_steps: int
    held_out: Batches | None = None
    is_packed: bool = True
    on_window: Callable[[Ledger], None] = lambda ledger: None
    together: Together = call_here
    fill: float | None = None

    def steps(self, place: Place = FIRST_PLACE, rank: int = 0, size: int = 1) -> Generator[Step | None, None, None]:
        """Endless steps starting at a place, each with the packs of one of `size` processes.

        None: the rows of the next step are still being labelled; ask again.
        """
        start, first = start_of(place)
        preparer = self.prepare(start) if rank == 0 else None
        reader = _WindowReader(self, preparer)
        try:
            while not reader.is_ready(start):
                yield None
            window = reader.open(start)
            at = min(first, len(window.packs))  # another seed or tokenizer was allowed on resume, so fewer packs
            while True:
                parts: list[tuple[TokenStore, list[Pack]]] = []
                missing = self.packs_per_step
                while missing:
                    if at == len(window.packs):
                        while not reader.is_ready(window.end):
                            yield None
                        window, at = reader.open(window.end), 0
                    taken = window.packs[at : at + missing]
                    parts.append((window.store, taken))
                    at, missing = at + len(taken), missing - len(taken)
                whole = Batches(*join_parts(parts), self.is_packed)
                after = {**window.start.to_json(), "pack": at}
                reader.forget_behind(window.start.number)
                yield Step(whole.share(rank, size), whole, window.epochs_at(at), after)
        finally:
            if preparer:
                preparer.close()
                remove_windows(self.folder)

    @property
    def mix(self) -> None:
        """Sources are read one after another."""
        return

    @property
    def total_epochs(self) -> None:
        """Not known before the end."""
        return

    @property
    def tokens_per_step(self) -> float:
        return self.capacity * self.packs_per_step * (self.fill or 1.0)

    def describe_packs(self, noun: str) -> str:
        fill = f", {self.fill:.1%} full at first" if self.fill else ""
        return f"{noun}s of {self.capacity} tokens{fill}"

    def describe_steps(self) -> str:
        return f"{self.total_steps:,} steps of about {format_count(self.tokens_per_step)} tokens"


class _WindowReader:
    """Opens windows in order, lets the next ones be prepared, and deletes those that all processes are done with."""

    def __init__(self, feed: StreamingFeed, preparer: Preparer | None) -> None:
        self._feed, self._preparer = feed, preparer
        self._oldest = self._done = preparer.start.number if preparer else 0

    def is_ready(self, start: Start) -> bool:
        """Whether the window that begins at a place is on disk; waits a moment for it."""
        preparer, feed = self._preparer, self._feed

        def look() -> bool:
            assert preparer is not None
            preparer.allow(feed.folder, start.number + _AHEAD)
            try:
                return preparer.has(start.number, _POLL_S)
            except DataError as error:  # the run has begun: its last checkpoint is named
                raise RunError(str(error), code=error.code) from None

        return feed.together(look)

    def open(self, start: Start) -> Window:
        feed = self._feed
        while self._preparer is None and not is_whole(feed.folder, start):  # a shared file system may lag
            time.sleep(_POLL_S)
        window = open_window(feed.folder, start, feed.capacity, feed.seed)
        if self._preparer:
            feed.on_window(load_ledger(window.end.ledger))
        return window

    def forget_behind(self, number: int) -> None:
        """Delete windows that the step before the last one was done with; other processes may be one step behind."""
        if self._preparer:
            for old in range(self._oldest, self._done):
                with contextlib.suppress(OSError):
                    shutil.rmtree(window_folder(self._feed.folder, old))
            self._oldest, self._done = self._done, number


def join_parts(parts: Sequence[tuple[TokenStore, list[Pack]]]) -> tuple[TokenStore, list[Pack]]:
    """Packs of several stores as packs of one; only a step that spans windows needs a copy."""
    if len(parts) == 1:
        return parts[0]
    files: dict[str, int] = {}
    samples: list[Sample] = []
    packs: list[Pack] = []
    numbers: list[tuple[int, int]] = []
    for store, chosen in parts:
        for pack in chosen:
            packs.append(np.arange(len(numbers), len(numbers) + len(pack)))
            for index in pack.tolist():
                samples.append(store[index])
                name = store.files[store.file_numbers[index]]
                numbers.append((files.setdefault(name, len(files)), int(store.row_numbers[index])))
    where = _column(numbers, 0), _column(numbers, 1)
    offsets = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])
    tokens = np.concatenate([sample.input_ids for sample in samples])
    loss_mask = np.concatenate([sample.loss_mask for sample in samples])
    targets = np.array([sample.num_targets for sample in samples], np.int64)
    starts = np.array([0, len(tokens)], np.int64)
    return TokenStore([(tokens, loss_mask)], starts, offsets, targets, *where, list(files)), packs


def _column(rows: list[tuple[int, int]], place: int) -> npt.NDArray[np.int64]:
    return np.array([row[place] for row in rows], np.int64)
