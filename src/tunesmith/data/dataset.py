"""A run's data on disk: the files they come from, token stores for training and evaluation, and ledgers."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.config.sources import has_amounts
from tunesmith.config.train_keys import TrainSection
from tunesmith.data.feed import Batches, Feed, plan_samples
from tunesmith.data.ledger import Ledger
from tunesmith.data.split import Numbers, split_eval
from tunesmith.data.store import TokenStore, open_store
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import TunesmithError
from tunesmith.files import sha256_file, sha256_text
from tunesmith.plans.mix import Mix, MixedPlan
from tunesmith.plans.plan import Plan, ShuffledPlan, count_steps
from tunesmith.plans.prefixes import find_prefixes
from tunesmith.plans.sharing import LEAST_RATIO, Sharing
from tunesmith.plans.sources import SourceShare, build_mix, describe_sources, match_sources
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import Sources, find_sources

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
    names = [*map(str, train_files), *(":".join(filter(None, hub)) for hub in train.hub)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise TunesmithError(
            f"{twice[0]}: is listed twice in data.train, so its rows would count twice. Remove one; to train on it "
            "several times, give a source with epochs.",
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
        mix: the sources of `train`, where data.train gives an amount, or more than a name, for one of them.
    """

    train: TokenStore
    train_samples: Numbers
    ledger: Ledger
    eval: TokenStore | None
    eval_samples: Numbers
    eval_ledger: Ledger | None
    sha256: StoreHashes
    mix: Mix | None = None

    def describe_sources(self) -> list[SourceShare]:
        """Of a mix; else empty."""
        if self.mix is None:
            return []
        return describe_sources(self.mix, self.ledger.count_sources(), self.train_samples, self.train.lengths)

    def ledger_json(self, encoder: Encoder, date: datetime.datetime) -> dict[str, Any]:
        """The content of data_ledger.json, for `spell_sealed`: its long lists are made as they are written."""
        store = self.train
        is_held_out = np.ones(len(store), dtype=bool)
        is_held_out[self.train_samples] = False
        return {
            # rows of the training files that data.eval_split holds out (pieces of a row where one long text was split)
            "held_out": SampleNames(store, np.flatnonzero(is_held_out)),
            **({"mix": [source.to_json() for source in self.describe_sources()]} if self.mix else {}),
            "train": self.ledger.to_json(is_lazy=True),
            "eval": self.eval_ledger.to_json(is_lazy=True) if self.eval_ledger else None,
            "template": describe_template(encoder, date),
        }


def describe_template(encoder: Encoder, date: datetime.datetime) -> dict[str, Any]:
    """The chat template in data_ledger.json."""
    template = encoder.template
    return {
        "source": template.source if template else "none",
        "sha256": sha256_text(template.text) if template else None,
        "date": date.isoformat(),
        "stop_token": encoder.stop.text,
    }


class SampleNames(Sequence[str]):
    """FILE:ROW of samples, each made on demand."""

    def __init__(self, store: TokenStore, samples: Numbers) -> None:
        self._store, self._samples = store, samples

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._store.where(int(sample)) for sample in self._samples[index]]
        return self._store.where(int(self._samples[index]))


def open_dataset(
    data: DataSection, seed: int, folder: RunFolder, hashes: StoreHashes, ledger: Ledger, eval_ledger: Ledger | None
) -> Dataset:
    """Open what `write_dataset` wrote to `folder`, without verifying it (see `find_store_damage`).

    Any number of processes may have it open, once the one that wrote it has returned from `write_dataset` and the
    folder has its final name.
    """
    eval_store = open_store(folder.eval_tokens) if folder.eval_tokens.name in hashes else None
    return split_dataset(data, seed, open_store(folder.tokens), ledger, eval_store, eval_ledger, hashes)


def split_dataset(
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
    mix = None
    assert ledger.sources or not has_amounts(data.train), "a ledger without the sources of its mix"
    if ledger.sources:
        mix = build_mix(ledger.sources, data.train, store.files, store.file_numbers, train_samples, store.lengths)
    return Dataset(store, train_samples, ledger, eval_store, eval_samples, eval_ledger, hashes, mix)


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


NOT_SHARED = Sharing()


def find_sharing(dataset: Dataset, data: DataSection, capacity: int, seed: int, is_wanted: bool) -> Sharing:
    """What computing shared prefixes once saves. It is off where the samples do not share enough.

    Args:
        capacity: tokens per pack.
        is_wanted: also where they do not.
    """
    store, samples = dataset.train, dataset.train_samples
    prefixes = find_prefixes(store, samples, store.row_ids)
    tokens = int(store.lengths[samples].sum())
    found = Sharing(True, tokens, tokens - int(prefixes.shared.sum()), train=prefixes)
    if found.ratio >= LEAST_RATIO or is_wanted:  # in the packs, it may be less
        plan = plan_training(dataset, capacity, seed, found)
        naive = plan_training(dataset, capacity, seed)
        found = replace(found, tokens=naive.tokens_per_epoch, computed=plan.tokens_per_epoch)
    if found.ratio < LEAST_RATIO and not is_wanted:
        return found.off(f"samples begin alike too seldom ({found.ratio:.2f} tokens for each computed)")
    held_out = None
    if dataset.eval is not None:
        held_out = find_prefixes(dataset.eval, dataset.eval_samples, dataset.eval.row_ids)
    return replace(found, eval=held_out, trains_once=data.train_on == "all")


def build_feed(
    dataset: Dataset, train: TrainSection, capacity: int, is_packed: bool, sharing: Sharing = NOT_SHARED
) -> Feed:
    """The feed of a run over a data set.

    Args:
        capacity: tokens per pack.
        is_packed: whether one forward computes a whole pack.
    """
    plan = plan_training(dataset, capacity, train.seed, sharing)
    total = train.max_steps or count_steps(plan, train.grad_accum_steps, train.epochs)
    mix = dataset.mix if dataset.mix is not None and dataset.mix.size > 1 else None
    held_out = None
    if dataset.eval is not None:
        packs = plan_samples(dataset.eval, dataset.eval_samples, capacity, 0, 0, sharing.eval)
        eval_mix = match_sources(dataset.ledger.sources, dataset.eval.files, dataset.eval.file_numbers) if mix else None
        held_out = Batches(dataset.eval, packs, is_packed, mix=eval_mix, prefixes=sharing.eval)
    return Feed(
        dataset.train, plan, train.grad_accum_steps, total, held_out, is_packed, mix, sharing.train, sharing.trains_once
    )


def plan_training(dataset: Dataset, capacity: int, seed: int, sharing: Sharing = NOT_SHARED) -> Plan:
    """The packs of every epoch of a run."""
    samples, lengths = dataset.train_samples, dataset.train.lengths
    if dataset.mix is not None and dataset.mix.quotas:
        return MixedPlan(samples, lengths, dataset.mix, capacity, seed, sharing.train)
    return ShuffledPlan(samples, lengths, capacity, seed, sharing.train)
