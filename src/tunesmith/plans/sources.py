"""The sources of data.train: which files belong to each, and how much of each a pass takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.config.sources import Source, SourceSection, has_amounts, is_mix, name_sources
from tunesmith.errors import DataError
from tunesmith.plans.epoch import Numbers
from tunesmith.plans.mix import Mix, quotas_by_epochs, quotas_by_weight
from tunesmith.sources.read import Sources

FilesOf = Mapping[str, Sequence[str]]  # name of a source -> what its rows name as their files


def files_of_sources(train: Sequence[Source], found: Sources) -> dict[str, list[str]]:
    """The files of each source; empty where data.train is a plain list of names, whose rows are not told apart.

    Raises:
        DataError: two sources are configs of one hub data set, whose rows have one name.
    """
    if not (is_mix(train) or has_amounts(train)):
        return {}
    names = name_sources(train)
    owners: dict[str, str] = {}
    for name, part in zip(names, found.parts, strict=True):
        for file in found.row_files(part):
            if owners.setdefault(file, name) != name:
                raise DataError(
                    f"data.train: sources {owners[file]} and {name} are both named {file}. Save one of them as a file "
                    "and name that.",
                    code="sources-alike",
                )
    return {name: found.row_files(part) for name, part in zip(names, found.parts, strict=True)}


@dataclass(frozen=True, slots=True)
class SourceShare:
    """A source of a mix, for people.

    Attributes:
        rows: that are used; samples, tokens: to train on.
        asked: share of the tokens, by data.train: of its weight, or of its tokens times its epochs.
        quota: tokens in a pass over the mix.
        passes: times that its tokens are trained on in a pass over the mix.
    """

    name: str
    rows: int
    samples: int
    tokens: int
    asked: float
    quota: float

    @property
    def passes(self) -> float:
        return self.quota / max(1, self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rows": self.rows,
            "samples": self.samples,
            "tokens": self.tokens,
            "share": round(self.asked, 6),
            "tokens_per_epoch": round(self.quota),
            "passes_per_epoch": round(self.passes, 6),
        }


def match_sources(files_of: FilesOf, files: Sequence[str], file_numbers: Any) -> Mix | None:
    """The source of each sample of a store; None where it has rows of other files."""
    owners = {file: number for number, own in enumerate(files_of.values()) for file in own}
    if not all(file in owners for file in files):
        return None
    of_file = np.array([owners[file] for file in files], np.int16)
    return Mix(tuple(files_of), of_file[file_numbers])


def build_mix(
    files_of: FilesOf, train: Sequence[Source], files: Sequence[str], file_numbers: Any, samples: Numbers, lengths: Any
) -> Mix:
    """The mix of a store.

    Args:
        files_of: from `files_of_sources`.
        train: data.train, for the amounts.
        files, file_numbers, lengths: of the store.
        samples: those to train on.

    Raises:
        DataError: a source with an amount has no samples.
    """
    mix = match_sources(files_of, files, file_numbers)
    assert mix is not None
    names, source_of = mix.names, mix.source_of
    if not has_amounts(train):
        return mix
    tokens = count_tokens(source_of, samples, lengths, len(names))
    if empty := [name for name, count in zip(names, tokens, strict=True) if not count]:
        raise DataError(
            f"data.train: source {empty[0]} has no rows to train on (data.limit, data.eval_split or refused rows leave "
            "none). Remove it from the list, or change these keys.",
            code="source-without-rows",
        )
    sections = [item for item in train if isinstance(item, SourceSection)]
    if all(item.weight is not None for item in sections) and len(sections) == len(train):
        return Mix(names, source_of, quotas_by_weight(tokens, [item.weight or 0.0 for item in sections]))
    epochs = [(item.epochs or 1.0) if isinstance(item, SourceSection) else 1.0 for item in train]
    return Mix(names, source_of, quotas_by_epochs(tokens, epochs))


def count_tokens(source_of: Any, samples: Numbers, lengths: Any, size: int) -> list[int]:
    counts = np.bincount(source_of[samples], lengths[samples], size)
    return [int(count) for count in counts]


def describe_sources(mix: Mix, rows: Sequence[int], samples: Numbers, lengths: Any) -> list[SourceShare]:
    """What each source has and gives.

    Args:
        rows: used ones of each source.
        samples: those to train on.
    """
    num_samples = np.bincount(mix.source_of[samples], minlength=mix.size).tolist()
    tokens = count_tokens(mix.source_of, samples, lengths, mix.size)
    quotas = [float(quota) for quota in mix.quotas] if mix.quotas else [float(count) for count in tokens]
    return [
        SourceShare(
            name, rows[number], num_samples[number], tokens[number], quotas[number] / sum(quotas), quotas[number]
        )
        for number, name in enumerate(mix.names)
    ]
