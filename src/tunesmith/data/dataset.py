"""Write a run's data to disk: label all rows into token stores, with a ledger of each row's outcome."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.config.train_keys import TrainSection
from tunesmith.data.feed import Batches, Feed, count_steps, plan_samples
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
from tunesmith.data.split import Numbers, split_eval
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, TunesmithError
from tunesmith.files import sha256_file, sha256_text
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import RawRow, Sources, find_sources, read_rows

StoreHashes = Mapping[str, Mapping[str, str]]  # folder of a store -> file -> SHA-256 of the bytes written


@dataclass(frozen=True, slots=True)
class DataSources:
    """The files behind data.train and data.eval, resolved once, so that what is hashed is what is read."""

    train: Sources
    eval: Sources

    @property
    def files(self) -> list[Path]:
        return [*self.train.files, *self.eval.files]


def find_data(data: DataSection, given: Collection[str] = ()) -> DataSources:
    """Resolve the names in data.train and data.eval.

    Args:
        given: which of "train" and "eval" are rows given in Python, which have no source yet.

    Raises:
        DataError: a name matches nothing.
    """
    train = Sources() if "train" in given else find_sources(data.train)
    return DataSources(train, Sources() if "eval" in given else find_sources(data.eval or []))


def refuse_shared_files(sources: DataSources) -> None:
    """Check that no file is read twice.

    Raises:
        TunesmithError: a file or a hub data set is in both data.train and data.eval, or twice in data.train.
    """
    train, held_out = sources.train, sources.eval
    train_files = [path.resolve() for path in train.files]
    both = set(train_files) & {path.resolve() for path in held_out.files} or set(train.hub) & set(held_out.hub)
    if both:
        first = next(iter(both))
        name = first[0] if isinstance(first, tuple) else first
        raise TunesmithError(
            f"{name}: is in both data.train and data.eval; evaluation needs rows that are not trained on. Give other "
            "files, or data.eval_split to hold some rows out.",
            code="eval-is-trained",
        )
    twice = [str(path) for path in train_files if train_files.count(path) > 1]
    if twice:
        raise TunesmithError(
            f"{twice[0]}: is listed twice in data.train, so its rows would count twice. Remove one.",
            code="file-named-twice",
        )


@dataclass(frozen=True, slots=True)
class Dataset:
    """Data on disk, ready for training.

    Attributes:
        train_samples: sample numbers of `train`, without those held out by data.eval_split.
        eval: store used for evaluation: a separate one, or `train` again; None without evaluation.
        eval_samples: sample numbers of `eval`.
        sha256: expected hashes of the stores' files.
    """

    train: TokenStore
    train_samples: Numbers
    ledger: Ledger
    eval: TokenStore | None
    eval_samples: Numbers
    eval_ledger: Ledger | None
    sha256: StoreHashes

    def ledger_json(self, encoder: Encoder, date: datetime.datetime) -> dict[str, Any]:
        """The content of data_ledger.json."""
        template, store = encoder.template, self.train
        trained = set(self.train_samples.tolist())
        return {
            # rows of the training files that data.eval_split holds out (pieces of a row where one long text was split)
            "held_out": [store.where(index) for index in range(len(store)) if index not in trained],
            "train": self.ledger.to_json(),
            "eval": self.eval_ledger.to_json() if self.eval_ledger else None,
            "template": {
                "source": template.source if template else "none",
                "sha256": sha256_text(template.text) if template else None,
                "date": date.isoformat(),
                "stop_token": encoder.stop.text,
            },
        }


def write_dataset(
    data: DataSection, sources: DataSources, encoder: Encoder, max_seq_len: int, seed: int, folder: RunFolder
) -> Dataset:
    """Label all rows into stores in `folder`.

    What is drawn for rows (data.system_prompts, data.empty_think_share) changes training rows only. Rows that
    data.eval_split holds out are labelled once more, as they are in the data.

    Args:
        seed: for data.eval_split and the draws.

    Raises:
        DataError: too many rows are refused, or a file changed while it was read.
    """
    draws = RowDraws.of(data, seed)
    drawn = _Rows(sources.train, read_rows(sources.train, data.encoding, data.max_row_mb), draws)
    store, ledger, hashes = _label_into(folder.tokens, drawn, data, encoder, max_seq_len)
    held_out = _held_out_rows(store, data, seed) if draws and data.eval_split else None
    if not data.eval and not held_out:
        return _split(data, seed, store, ledger, None, None, {folder.tokens.name: hashes})
    found = replace(sources.train, passed_over=[]) if held_out else sources.eval
    rows: Iterator[RawRow] = read_rows(found, data.encoding, data.max_row_mb)
    if held_out:
        rows = (row for row in itertools.islice(rows, data.limit) if (row.file, row.number) in held_out)
    unlimited = data.model_copy(update={"limit": None, "max_cut_replies": 1.0})  # nothing learns from these
    eval_store, eval_ledger, eval_hashes = _label_into(
        folder.eval_tokens, _Rows(found, rows), unlimited, encoder, max_seq_len
    )
    both = {folder.tokens.name: hashes, folder.eval_tokens.name: eval_hashes}
    return _split(data, seed, store, ledger, eval_store, eval_ledger, both)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of sources, and what is drawn for them."""

    sources: Sources
    rows: Iterable[RawRow]
    draws: RowDraws | None = None


def _held_out_rows(store: TokenStore, data: DataSection, seed: int) -> set[tuple[str, int]]:
    """(file, number) of the rows that data.eval_split holds out; none where it holds out pieces of rows."""
    trained, held_out = split_eval(store, data.eval_split, seed)
    rows = store.row_ids
    if np.isin(rows[held_out], rows[trained]).any():
        return set()
    return {(store.files[store.file_numbers[index]], int(store.row_numbers[index])) for index in held_out.tolist()}


def open_dataset(
    data: DataSection, seed: int, folder: RunFolder, hashes: StoreHashes, ledger: Ledger, eval_ledger: Ledger | None
) -> Dataset:
    """Open what `write_dataset` wrote to `folder`, without verifying it (see `find_store_damage`)."""
    eval_store = open_store(folder.eval_tokens) if folder.eval_tokens.name in hashes else None
    return _split(data, seed, open_store(folder.tokens), ledger, eval_store, eval_ledger, hashes)


def _split(
    data: DataSection,
    seed: int,
    store: TokenStore,
    ledger: Ledger,
    eval_store: TokenStore | None,
    eval_ledger: Ledger | None,
    hashes: StoreHashes,
) -> Dataset:
    train_samples, eval_samples = split_eval(store, data.eval_split, seed)
    if eval_store is not None:
        eval_samples = np.arange(len(eval_store))
    elif len(eval_samples):
        eval_store = store
    return Dataset(store, train_samples, ledger, eval_store, eval_samples, eval_ledger, hashes)


def _label_into(
    folder: Path, given: _Rows, data: DataSection, encoder: Encoder, max_seq_len: int
) -> tuple[TokenStore, Ledger, dict[str, str]]:
    """Label rows into a store; returns the store, the ledger and the hashes of its files."""
    sources, draws = given.sources, given.draws
    before = _stamps(sources.files)
    ledger = Ledger(passed_over=[str(path) for path in sources.passed_over])
    writer = StoreWriter(folder)
    with writer:
        for row in label_rows(given.rows, encoder, data, max_seq_len, folder=folder.parent, draws=draws):
            ledger.add(row)
            writer.add(row)
    ledger.raise_if_unusable(data.max_refused)
    ledger.raise_if_cut(data.max_cut_replies, max_seq_len)
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


def hash_store(folder: Path) -> dict[str, str]:
    """SHA-256 of a store's files."""
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


def find_store_damage(folder: RunFolder, hashes: StoreHashes) -> str:
    """The first file of the run's token stores that is missing or changed, with the reason; "" if none is."""
    for name, files in hashes.items():
        store = folder.path / name
        now = hash_store(store) if store.is_dir() else {}
        for file, sha256 in files.items():
            if now.get(file) != sha256:
                what = "has changed" if file in now else "is missing"
                return f"{store / file}: {what} since the run began"
    return ""


def build_feed(dataset: Dataset, train: TrainSection, capacity: int, is_packed: bool) -> Feed:
    """The feed of a run over a data set.

    Args:
        capacity: tokens per pack.
        is_packed: whether one forward computes a whole pack.
    """
    lengths, packs_per_step, seed = dataset.train.lengths_of(dataset.train_samples), train.grad_accum_steps, train.seed
    total = train.max_steps or count_steps(lengths, capacity, packs_per_step, seed, train.epochs)
    held_out = None
    if dataset.eval is not None:
        packs = plan_samples(dataset.eval, dataset.eval_samples, capacity, 0, 0)
        held_out = Batches(dataset.eval, packs, is_packed)
    return Feed(dataset.train, dataset.train_samples, capacity, packs_per_step, seed, total, held_out, is_packed)
