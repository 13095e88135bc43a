"""Chunks of rows, and chunks of labelled rows: what is sent to a worker, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import Labeller, begins_file
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.store import Numbers, Samples
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.portable import PortableEncoder
from tunesmith.sources.jsonfile import JsonLine
from tunesmith.sources.read import RawRow
from tunesmith.sources.rowsize import measure_row
from tunesmith.sources.textfile import find_long_text

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 20  # at least; a chunk ends with the row that reaches it


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows one after another.

    Attributes:
        seen_files: those of its files of which a row came in an earlier chunk.
        characters: of its rows, roughly.
    """

    rows: list[RawRow]
    seen_files: frozenset[str]
    characters: int

    @property
    def is_long(self) -> bool:
        """Whether it is one document that is read block by block, which no worker takes."""
        return len(self.rows) == 1 and find_long_text(self.rows[0].value) is not None


def chunk_rows(rows: Iterable[RawRow], skip: int = 0) -> Iterator[Chunk]:
    """All rows in chunks that hold at most CHUNK_ROWS rows and little more than CHUNK_CHARACTERS.

    Args:
        skip: rows at the beginning that are read and left out, up to the end of a chunk of an earlier call.
    """
    seen_files: set[str] = set()
    held: list[RawRow] = []
    known: frozenset[str] = frozenset()
    characters = 0
    for row in rows:
        if skip:
            skip -= 1
            begins_file(row, seen_files)
            continue
        is_long = find_long_text(row.value) is not None
        if held and is_long:
            yield Chunk(held, known, characters)
            held, characters = [], 0
        if not held:
            known = frozenset(seen_files)
        begins_file(row, seen_files)
        held.append(row)
        characters += _count_characters(row)
        if is_long or len(held) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield Chunk(held, known & {one.file for one in held}, characters)
            held, characters = [], 0
    if held:
        yield Chunk(held, known & {one.file for one in held}, characters)


def _count_characters(row: RawRow) -> int:
    if isinstance(row.value, JsonLine):
        return len(row.value.text)
    return measure_row(row.value, CHUNK_CHARACTERS)


@dataclass(frozen=True, slots=True)
class LabelledChunk:
    """The samples of a chunk, and what became of its rows."""

    samples: Samples
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Labelling:
    """What decides the labels of rows, in a form that can be sent to another process."""

    encoder: PortableEncoder
    data: DataSection
    max_seq_len: int
    draws: RowDraws | None

    def open(self) -> ChunkLabeller:
        return ChunkLabeller(self.encoder.build(), self.data, self.max_seq_len, self.draws)


class ChunkLabeller:
    """Label chunks, each as if all rows before it had been labelled by the same object.

    Args:
        folder: for temporary files of long documents; by default the system's.
    """

    def __init__(
        self, encoder: Encoder, data: DataSection, max_seq_len: int, draws: RowDraws | None, folder: Path | None = None
    ) -> None:
        self._labeller = Labeller(encoder, data, max_seq_len, encoder.renderer(), folder, draws)

    def rows(self, chunk: Chunk) -> Iterator[LabelledRow]:
        """The rows with their outcomes.

        Raises:
            DataError: the first row of a file has an unknown format, or a line is broken.
        """
        return self._labeller.label(chunk.rows, set(chunk.seen_files))

    def __call__(self, chunk: Chunk) -> LabelledChunk:
        """As `rows`, with all samples joined."""
        ledger = Ledger()
        files: dict[str, int] = {}
        samples: list[Sample] = []
        places: list[tuple[int, int, bool]] = []  # file, row, and whether it is a chat, of each sample
        for row in self.rows(chunk):
            ledger.add_outcome(row)
            number = files.setdefault(row.file, len(files))
            samples += row.samples
            places += [(number, row.number, row.how != "text")] * len(row.samples)
        tokens = _join([sample.input_ids for sample in samples], np.uint32)
        loss_mask = _join([sample.loss_mask for sample in samples], np.uint8)
        lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
        num_targets, num_replies = _count(loss_mask, lengths)
        file_numbers, row_numbers, are_chats = np.array(places, np.int64).reshape(-1, 3).T
        ledger.tokens += len(tokens)
        ledger.target_tokens += int(num_targets.sum())
        ledger.num_replies += int(num_replies[are_chats > 0].sum())
        return LabelledChunk(
            Samples(
                tokens, loss_mask, lengths, num_targets.astype(np.int32), file_numbers.astype(np.int32),
                np.ascontiguousarray(row_numbers), list(files),
            ),
            ledger,
        )  # fmt: skip


def _count(loss_mask: npt.NDArray[np.uint8], lengths: Numbers) -> tuple[Numbers, Numbers]:
    """`Sample.num_targets` and `Sample.num_replies` of samples joined."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    is_first = np.zeros(len(loss_mask) + 1, bool)  # an empty sample at the end begins after the last token
    is_first[starts] = True
    before = np.concatenate([np.zeros(1, np.uint8), loss_mask[:-1]])
    trained = np.where(is_first[:-1], 0, loss_mask)
    begins = loss_mask * (is_first[:-1] | (before == 0))
    counts = [np.concatenate([np.zeros(1, np.int64), np.cumsum(one, dtype=np.int64)]) for one in (trained, begins)]
    num_targets, num_replies = (count[ends] - count[starts] for count in counts)
    return num_targets, num_replies


def _join(arrays: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays])
