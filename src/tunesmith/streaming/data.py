"""Data of a streamed run: what is checked and labelled before step 1, and the labelling process."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.config.train_keys import TrainSection
from tunesmith.data.dataset import DataSources, StoreHashes, describe_template
from tunesmith.data.feed import FIRST_PLACE, Batches, Place, plan_samples
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.display import format_bytes
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.files import spell_sealed, write_text_atomic
from tunesmith.preparation.write import write_dataset
from tunesmith.runfolder import RunFolder
from tunesmith.sources.datafile import container_of
from tunesmith.sources.folders import TEXT_SUFFIXES
from tunesmith.sources.read import RawRow, Sources
from tunesmith.streaming.cursor import Cursor, Start
from tunesmith.streaming.feed import StreamingFeed, Together, start_of
from tunesmith.streaming.job import EncoderParts, Job, WindowSize
from tunesmith.streaming.ledger import describe_ledger, load_ledger
from tunesmith.streaming.preparer import Preparer
from tunesmith.streaming.rows import count_sources, name_source, read_source
from tunesmith.streaming.windows import open_window, remove_windows, take_stamp

_HEAD_ROWS, _ALL_HEADS = 16, 4096  # rows that are labelled before step 1: of each file, and of all files
_LARGEST_TEXT = 1 << 30  # bytes of a .txt or .md file, which is one document and so one window
_WAIT_S = 0.5
MIN_SAMPLES, MIN_TOKENS = 8192, 1 << 22  # of a window: one or the other


@dataclass(eq=False)
class StreamedDataset:
    """The data of a run with data.stream.

    Attributes:
        job: for the labelling process; None on other processes than the main one.
        ledger: counts of all rows up to the window that is trained on.
        eval, eval_ledger: as in `Dataset`.
        sha256: expected hashes of the evaluation store.
        fill: share of the first window's packs that is not empty, where it is known.
        first: the labelling process that was started before step 1, with its first window.
    """

    job: Job | None
    ledger: Ledger
    eval: TokenStore | None = None
    eval_ledger: Ledger | None = None
    sha256: StoreHashes = field(default_factory=dict)
    fill: float | None = None
    first: Preparer | None = None

    def prepare(self, start: Start) -> Preparer:
        """A labelling process that begins at a place."""
        assert self.job is not None
        first, self.first = self.first, None
        if first and first.start.number == start.number:
            return first
        if first:
            first.close()
        return Preparer(replace(self.job, start=start))

    def close(self) -> None:
        """End the labelling process, if no feed has taken it."""
        if self.first:
            self.first.close()
            self.first = None

    def ledger_json(self, encoder: Encoder, date: datetime.datetime) -> dict[str, Any]:
        """The content of data_ledger.json."""
        return {
            "held_out": [],
            "train": describe_ledger(self.ledger, is_lazy=True),
            "eval": self.eval_ledger.to_json(is_lazy=True) if self.eval_ledger else None,
            "template": describe_template(encoder, date),
        }


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What a stream needs to know of its run.

    Attributes:
        capacity: tokens per pack.
    """

    data: DataSection
    train: TrainSection
    encoder: Encoder
    max_seq_len: int
    capacity: int


def write_stream(settings: StreamSettings, sources: DataSources, folder: RunFolder) -> StreamedDataset:
    """Check the beginning of every file, label the evaluation data, and let the first window be labelled.

    Raises:
        DataError: a file is unreadable or of an unknown format, or too many rows of the first window are refused.
    """
    write_heads(settings, sources.train, folder.tokens)
    dataset = StreamedDataset(make_job(settings, sources.train, Start()), Ledger())
    if settings.data.eval:
        write_eval(settings, sources.eval, folder, dataset)
    dataset.first = preparer = dataset.prepare(Start())
    try:
        preparer.allow(folder.tokens, 0)
        while not preparer.has(0, _WAIT_S):
            pass
        window = open_window(folder.tokens, Start(), settings.capacity, settings.train.seed)
    except BaseException:
        dataset.close()
        raise
    dataset.fill = int(window.store.lengths.sum()) / (len(window.packs) * settings.capacity)
    dataset.ledger = load_ledger(window.end.ledger)
    dataset.ledger.passed_over = [str(path) for path in sources.train.passed_over]
    return dataset


def open_stream(
    settings: StreamSettings,
    sources: DataSources | None,
    folder: RunFolder,
    hashes: StoreHashes,
    place: Place = FIRST_PLACE,
    eval_ledger: Ledger | None = None,
) -> StreamedDataset:
    """The data of a run that continues at a place.

    Args:
        sources: None on other processes than the main one.
    """
    start, _ = start_of(place)
    dataset = StreamedDataset(None, load_ledger(start.ledger), eval_ledger=eval_ledger, sha256=hashes)
    if sources is not None:
        remove_windows(folder.tokens)
        dataset.job = make_job(settings, sources.train, start)
        dataset.ledger.passed_over = [str(path) for path in sources.train.passed_over]
    if folder.eval_tokens.name in hashes:
        dataset.eval = open_store(folder.eval_tokens)
    return dataset


def make_job(settings: StreamSettings, sources: Sources, start: Start) -> Job:
    """The labelling of a run's stream from a place on."""
    paths = {path: Path(os.path.abspath(path)) for path in sources.files}
    names = {absolute: sources.name_of(path) for path, absolute in paths.items()}
    return Job(
        encoder=EncoderParts.of(settings.encoder),
        data=settings.data,
        sources=replace(sources, files=list(paths.values()), names=names),
        stamps=[(path, take_stamp(path)) for path in paths.values()],
        max_seq_len=settings.max_seq_len,
        seed=settings.train.seed,
        size=WindowSize(MIN_SAMPLES, MIN_TOKENS, settings.capacity * settings.train.grad_accum_steps),
        start=start,
    )


def write_heads(settings: StreamSettings, sources: Sources, folder: Path) -> None:
    """Label the first rows of every file and hub data set, so that a wrong name or format is found before step 1.

    They are kept as a token store, for the run's report and page.

    Raises:
        DataError: naming the file.
    """
    data = settings.data.model_copy(update={"limit": None})
    count, draws = count_sources(sources), RowDraws.of(data, settings.train.seed)
    num_rows = max(1, min(_HEAD_ROWS, _ALL_HEADS // max(1, count)))
    with StoreWriter(folder) as writer:
        for number in range(count):
            if number < len(sources.files):
                refuse_long_text(sources.files[number])
            read = itertools.islice(read_source(sources, Cursor(number), data), num_rows)
            name, ledger = name_source(sources, number), Ledger()
            rows = (RawRow(name, place, value) for place, value, _ in read)
            for row in label_rows(rows, settings.encoder, data, settings.max_seq_len, draws=draws):
                ledger.add(row)
                writer.add(row)
            if ledger.num_bad and not ledger.used:
                ledger.raise_if_unusable(data.max_refused)


def refuse_rows(rows: Collection[str]) -> None:
    """Raises:
    DataError: there are rows given in Python, which would be written to the disk as a whole.
    """
    if rows:
        raise DataError(
            "data.stream: rows given in Python are written to a file first, and a stream is for data that would not "
            "fit there. Give the names of files, or leave data.stream out.",
            code="rows-not-streamed",
        )


def refuse_long_text(path: Path) -> None:
    """Check the size of a file that is one document.

    Raises:
        DataError: its tokens would fill the disk.
    """
    if container_of(path) in TEXT_SUFFIXES and path.exists() and path.stat().st_size > _LARGEST_TEXT:
        raise DataError(
            f"{path}: a text file is one document, and its tokens would all be on disk at once. Split it into files "
            'of at most 1 GB, or write it as JSON Lines: {"text": "..."} on each line.',
            code="text-not-streamed",
        )


def write_eval(settings: StreamSettings, sources: Sources, folder: RunFolder, dataset: StreamedDataset) -> None:
    """Label data.eval as a run without data.stream does."""
    update: dict[str, Any] = {
        "train": settings.data.eval,
        "eval": None,
        "limit": None,
        "max_cut_replies": 1.0,
        "system_prompts": [],
        "system_prompt_share": 1.0,
        "empty_think_share": 1.0,
    }  # what is drawn changes training rows only
    data, staging = settings.data.model_copy(update=update), RunFolder(folder.path / ".eval.partial")
    staging.path.mkdir()
    only = DataSources(sources, Sources())
    made = write_dataset(data, only, settings.encoder, settings.max_seq_len, settings.train.seed, staging)
    staging.tokens.rename(folder.eval_tokens)
    shutil.rmtree(staging.path)
    dataset.eval, dataset.eval_ledger = open_store(folder.eval_tokens), made.ledger
    dataset.sha256 = {folder.eval_tokens.name: made.sha256[staging.tokens.name]}


def build_stream_feed(
    dataset: StreamedDataset, settings: StreamSettings, is_packed: bool, folder: RunFolder, together: Together
) -> StreamingFeed:
    """The feed of a run; data_ledger.json is written again for each window.

    Args:
        together: how the other processes of the run wait for the main one.
    """
    train, held_out = settings.train, None
    if dataset.eval is not None:
        packs = plan_samples(dataset.eval, np.arange(len(dataset.eval)), settings.capacity, 0, 0)
        held_out = Batches(dataset.eval, packs, is_packed)
    assert train.max_steps is not None  # config/rules.py
    date = settings.encoder.defaults.date

    def keep_ledger(ledger: Ledger) -> None:
        ledger.passed_over = dataset.ledger.passed_over
        dataset.ledger = ledger
        write_text_atomic(folder.ledger, spell_sealed(dataset.ledger_json(settings.encoder, date)))

    return StreamingFeed(
        folder.tokens, dataset.prepare, settings.capacity, train.grad_accum_steps, train.seed, train.max_steps,
        held_out, is_packed, keep_ledger, together, dataset.fill,
    )  # fmt: skip


def stream_lines(sources: Sources) -> list[tuple[str, str]]:
    """What is streamed, for the summary."""
    count, size = count_sources(sources), sum(path.stat().st_size for path in sources.files)
    what = f"{count:,} {'file' if not sources.hub else 'source'}{'s' if count != 1 else ''}"
    of = f" of {format_bytes(size)}" if sources.files else ""
    return [("data", f"streamed from {what}{of}: rows are labelled just ahead of training, in order, and shuffled only "
             f"within windows of about {MIN_SAMPLES:,} samples")]  # fmt: skip
