"""Label rows chunk by chunk, in this process or in several, with the same result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.data_keys import DataSection
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.store import StoreWriter
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.portable import PortableEncoder
from tunesmith.preparation.chunks import Chunk, ChunkLabeller, LabelledChunk, Labelling
from tunesmith.preparation.pool import Pool, available_cores

STARTS_AT = 4 << 20  # characters of rows from which on data.workers auto pays for the start of workers

Labelled = LabelledChunk | LabelledRow  # a row: a long document, whose samples are on disk


@dataclass(frozen=True, slots=True)
class LabelRules:
    """What decides the labels of rows.

    Attributes:
        draws: what is drawn for training rows; rows for evaluation have none.
    """

    encoder: Encoder
    data: DataSection
    max_seq_len: int
    draws: RowDraws | None = None


def label_chunks(
    chunks: Iterable[Chunk], rules: LabelRules, folder: Path | None = None
) -> Generator[Labelled, None, None]:
    """Every chunk labelled, in order; equal for any number of workers (data.workers).

    Close the iterator (contextlib.closing) if it is not read to its end: that ends the workers.

    Args:
        chunks: from `chunk_rows`. The workers are some chunks ahead of what is taken here.
        folder: for temporary files of long documents; by default the system's.

    Raises:
        DataError: the first row of a file has an unknown format, a line is broken, or as the labelling says.
        RunError: a worker was killed.
    """
    encoder, data = rules.encoder, rules.data
    here = ChunkLabeller(encoder, data, rules.max_seq_len, rules.draws, folder)

    def label(chunk: Chunk) -> Labelled:
        return next(iter(here.rows(chunk))) if chunk.is_long else here(chunk)

    num_workers = count_workers(data)
    portable = PortableEncoder.of(encoder) if num_workers else None
    setup = Labelling(portable, data, rules.max_seq_len, rules.draws) if portable else None
    starts_at = _late_start() if data.workers == "auto" else _at_once
    gc.freeze()  # searching what the libraries hold for garbage would take a fifth of the time
    try:
        with Pool[Chunk, Labelled](setup, num_workers, label) as pool:
            yield from pool.map(chunks, lambda chunk: chunk.is_long, starts_at)
    finally:
        gc.unfreeze()


def count_workers(data: DataSection) -> int:
    """Processes besides this one."""
    number = available_cores() if data.workers == "auto" else data.workers
    return number if number > 1 else 0


def _at_once(chunk: Chunk) -> bool:
    return True


def _late_start() -> Callable[[Chunk], bool]:
    """Small data are labelled before a worker would be ready."""
    characters = 0

    def is_due(chunk: Chunk) -> bool:
        nonlocal characters
        characters += chunk.characters
        return characters > STARTS_AT

    return is_due


def write_labelled(labelled: Labelled, writer: StoreWriter, ledger: Ledger) -> None:
    """Append to a store, and count."""
    if isinstance(labelled, LabelledRow):
        writer.add(labelled)
        ledger.add(labelled)
    else:
        writer.add_samples(labelled.samples)
        ledger.merge(labelled.ledger)
