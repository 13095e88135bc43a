"""Which rows are trained and evaluated, in which packs, and how many steps that makes."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.schema import DataSection, RunConfig
from tunesmith.data.ledger import Ledger
from tunesmith.data.pack import plan_epoch
from tunesmith.data.prepare import label_rows
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, TunesmithError
from tunesmith.files import sha256_text
from tunesmith.sources.read import Sources, find_sources, read_rows


@dataclass(frozen=True)
class Prepared:
    """Data on disk, ready to train.

    Attributes:
        sha256: folder of a store -> its files -> the hash of what was meant to be in them.
    """

    train: TokenStore
    ledger: Ledger
    eval: TokenStore | None
    eval_ledger: Ledger | None
    sha256: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Plan:
    """Which samples are trained, in which packs, and how many steps that makes.

    Attributes:
        train_ids, eval_ids: sample numbers of the stores.
        total_steps: optimizer steps of the run.
        first_epoch: the packs of epoch 0, for the summary.
    """

    train: TokenStore
    train_ids: np.ndarray
    eval: TokenStore | None
    eval_packs: list[np.ndarray]
    capacity: int
    seed: int
    grad_accum_steps: int
    total_steps: int
    first_epoch: list[np.ndarray]

    def epoch(self, number: int) -> list[np.ndarray]:
        packs = plan_epoch(self.train.lengths[self.train_ids], self.capacity, self.seed, number)
        return [self.train_ids[pack] for pack in packs]

    def steps(self, place: tuple[int, int] = (0, 0)) -> Iterator[PlannedStep]:
        """The steps from a place on (epoch, pack in it), without end."""
        number, first = place
        while True:
            packs = self.first_epoch if number == 0 else self.epoch(number)
            for start in range(first, len(packs), self.grad_accum_steps):
                group = packs[start : start + self.grad_accum_steps]
                behind = start + len(group)
                after = (number, behind) if behind < len(packs) else (number + 1, 0)
                yield PlannedStep(group, number + behind / len(packs), after)
            number, first = number + 1, 0


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The packs of a step, the epochs done after it, and the place behind it (epoch, pack)."""

    packs: list[np.ndarray]
    epoch: float
    after: tuple[int, int]


def refuse_shared_files(data: DataSection) -> None:
    """Every name is looked up before a model loads, and no file may be read twice."""
    train, held_out = find_sources(data.train), find_sources(data.eval or [])
    train_files = [path.resolve() for path in train.files]
    both = set(train_files) & {path.resolve() for path in held_out.files} or set(train.hub) & set(held_out.hub)
    if both:
        name = next(iter(both))
        raise TunesmithError(
            f"{name if isinstance(name, Path) else name[0]}: stands in data.train and in data.eval; what is trained on "
            "cannot be evaluated on. Give other files, or data.eval_split to hold some rows out."
        )
    twice = [str(path) for path in train_files if train_files.count(path) > 1]
    if twice:
        raise TunesmithError(f"{twice[0]}: is named twice in data.train, so that its rows would count twice.")


def prepare_data(data: DataSection, encoder: Encoder, max_seq_len: int, folder: Path) -> Prepared:
    """Label all rows into stores below `folder`; too many bad rows end it here."""
    sources, held_out = find_sources(data.train), find_sources(data.eval or [])
    train, ledger, hashes = _label_into(folder / "tokens", sources, data, encoder, max_seq_len)
    if not data.eval:
        return Prepared(train, ledger, None, None, {"tokens": hashes})
    unlimited = data.model_copy(update={"limit": None})
    store, eval_ledger, eval_hashes = _label_into(folder / "eval_tokens", held_out, unlimited, encoder, max_seq_len)
    return Prepared(train, ledger, store, eval_ledger, {"tokens": hashes, "eval_tokens": eval_hashes})


def _label_into(
    folder: Path, sources: Sources, data: DataSection, encoder: Encoder, max_seq_len: int
) -> tuple[TokenStore, Ledger, dict[str, str]]:
    """All rows of the sources in a store, what became of them, and the hashes of the store's files.

    Raises:
        DataError: too many rows are bad, or a file changed while it was read.
    """
    before = _stamps(sources.files)
    ledger = Ledger(passed_over=[str(path) for path in sources.passed_over])
    writer = StoreWriter(folder)
    with writer:
        for row in label_rows(read_rows(sources, data.encoding, data.max_row_mb), encoder, data, max_seq_len):
            ledger.add(row)
            writer.add(row)
    ledger.raise_if_unusable(data.max_refused)
    for path, stamp in _stamps(sources.files).items():
        if stamp != before[path]:
            raise DataError(f"{path}: was changed while it was read. Train once nothing writes to it any more.")
    return open_store(folder), ledger, writer.sha256


def _stamps(files: Sequence[Path]) -> dict[Path, tuple[int, int] | None]:
    """Size and time of each file; None where it is gone."""
    stats = ((path, path.stat()) if path.exists() else (path, None) for path in files)
    return {path: (stat.st_size, stat.st_mtime_ns) if stat else None for path, stat in stats}


def split_eval(store: TokenStore, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers to train and to evaluate on; whole rows go to one side.

    Where there are too few rows to hold any out (one long text), its pieces are split instead.
    """
    everything = np.arange(len(store))
    if not share:
        return everything, everything[:0]
    row_ids = store.file_numbers * (int(store.row_numbers.max()) + 1) + store.row_numbers
    units = np.unique(row_ids)
    if len(units) * share < 1:
        row_ids = units = everything
    num_held_out = max(1, round(len(units) * share))
    if num_held_out >= len(units):
        raise TunesmithError(
            f"data.eval_split {share}: {len(units)} rows are too few to hold any out. Give data.eval, or more data."
        )
    held_out = np.random.default_rng([seed, 0x5EED]).choice(units, num_held_out, replace=False)
    is_eval = np.isin(row_ids, held_out)
    return everything[~is_eval], everything[is_eval]


def build_plan(config: RunConfig, prepared: Prepared, capacity: int) -> Plan:
    train = config.train
    train_ids, held_out = split_eval(prepared.train, config.data.eval_split, train.seed)
    eval_store = prepared.eval or (prepared.train if len(held_out) else None)
    eval_packs: list[np.ndarray] = []
    if eval_store is not None:
        eval_ids = held_out if prepared.eval is None else np.arange(len(eval_store))
        packs = plan_epoch(eval_store.lengths[eval_ids], capacity, 0, 0)
        eval_packs = [eval_ids[pack] for pack in packs]
    plan = Plan(prepared.train, train_ids, eval_store, eval_packs, capacity, train.seed, train.grad_accum_steps,
                total_steps=0, first_epoch=[])  # fmt: skip
    plan = Plan(**{**plan.__dict__, "first_epoch": plan.epoch(0)})
    return Plan(**{**plan.__dict__, "total_steps": train.max_steps or count_steps(plan, train.epochs)})


def count_steps(plan: Plan, epochs: float) -> int:
    """Steps of so many epochs; each epoch is packed anew and may differ by a pack or two."""
    total = 0.0
    for number in range(math.ceil(epochs)):
        packs = plan.first_epoch if number == 0 else plan.epoch(number)
        total += math.ceil(len(packs) / plan.grad_accum_steps) * min(1.0, epochs - number)
    return max(1, round(total))


def ledger_json(
    ledger: Ledger, eval_ledger: Ledger | None, plan: Plan, encoder: Encoder, date: datetime.datetime
) -> dict[str, Any]:
    template, store = encoder.template, plan.train
    trained = set(plan.train_ids.tolist())
    return {
        # rows of the training files that data.eval_split holds out (pieces of rows, where one long text was split)
        "held_out": [store.where(index) for index in range(len(store)) if index not in trained],
        "train": ledger.to_json(),
        "eval": eval_ledger.to_json() if eval_ledger else None,
        "template": {
            "source": template.source if template else "none",
            "sha256": sha256_text(template.text) if template else None,
            "date": date.isoformat(),
            "stop_token": encoder.stop.text,
        },
    }
