"""Label the rows to score with each model's encoder, and find the replies in them."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.labelling import label_rows
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.evaluation.candidates import Candidate, RowsToScore
from tunesmith.evaluation.records import DataSummary, Refusal
from tunesmith.model.lengths import Lengths, choose_lengths
from tunesmith.model.load import load_config
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.rows.conversation import Conversation
from tunesmith.sources.names import name_row
from tunesmith.sources.read import RawRow, read_rows

Key = tuple[str, int]  # file and number of a row
_SPARE = 1.25  # rows drawn for each that is wanted: some are refused


@dataclass(frozen=True, slots=True)
class ReplySpan:
    """A trained reply: tokens [start, end) of a sample, the last of them its stop token."""

    sample: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RowSamples:
    """A usable row.

    Attributes:
        first, count: its samples in the store.
        replies: those that end with their stop token.
        tools: schemas of its tools.
        has_calls: whether it has tools, or turns that call some.
        is_cut: whether its end is beyond max_seq_len.
    """

    where: str
    first: int
    count: int
    replies: tuple[ReplySpan, ...]
    tools: tuple[dict[str, Any], ...] = ()
    has_calls: bool = False
    is_cut: bool = False


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """All rows as one model's encoder labels them.

    Attributes:
        rows: the usable ones, in the order of the data.
    """

    candidate: Candidate
    encoder: Encoder
    lengths: Lengths
    store: TokenStore
    ledger: Ledger
    rows: dict[Key, RowSamples] = field(default_factory=dict)

    def samples_of(self, keys: Sequence[Key]) -> list[int]:
        """Sample numbers of these rows."""
        found = (self.rows[key] for key in keys)
        return [number for row in found for number in range(row.first, row.first + row.count)]


def load_row_encoder(candidate: Candidate) -> tuple[Encoder, Lengths]:
    """The encoder of a model and its lengths, without its weights."""
    data = candidate.data
    tokenizer = load_tokenizer(candidate.section)
    template = candidate.template
    if template is None and not tokenizer.chat_template:
        template = candidate.other_template
    encoder = build_encoder(tokenizer, template, data.template_kwargs, candidate.date, data.control_text)
    config = load_config(candidate.section, tokenizer)
    return encoder, choose_lengths(config, data.max_seq_len, candidate.micro_batch_tokens)


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows drawn for --limit.

    Attributes:
        numbers: of each its number in the draw; the smallest are wanted first.
        total: rows that they were drawn from.
    """

    numbers: Mapping[Key, bytes]
    total: int


def draw_rows(candidate: Candidate, wanted: RowsToScore, limit: int, seed: int) -> Draw:
    """Draw rows by the seed, some more than wanted, since some may be refused.

    A row's number follows from its content, so that the order and the names of files do not matter. A smaller limit
    draws some of the rows of a larger one.
    """
    total = 0
    seen: Counter[bytes] = Counter()

    def numbered() -> Iterator[tuple[bytes, Key]]:
        nonlocal total
        for row in read_wanted(candidate, wanted):
            total += 1
            content = _digest(seed, _spell(row.value))
            seen[content] += 1
            yield _digest(seen[content], content), (row.file, row.number)

    drawn = heapq.nsmallest(int(limit * _SPARE) + 20, numbered())
    return Draw({key: number for number, key in drawn}, total)


def _spell(value: Any) -> bytes:
    """A row's content in bytes."""
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError):
        text = repr(value)
    return text.encode("utf-8", errors="surrogatepass")


def _digest(number: int, content: bytes) -> bytes:
    return hashlib.blake2b(f"{number} ".encode() + content, digest_size=16).digest()


def read_wanted(candidate: Candidate, wanted: RowsToScore, draw: Draw | None = None) -> Iterator[RawRow]:
    data = candidate.data
    for row in read_rows(wanted.sources, data.encoding, data.max_row_mb):
        key = (row.file, row.number)
        if (wanted.only is None or key in wanted.only) and (draw is None or key in draw.numbers):
            yield row


def label_wanted(candidate: Candidate, wanted: RowsToScore, draw: Draw | None, folder: Path) -> LabelledRows:
    """Label the rows exactly as training does.

    Args:
        folder: for the tokens; must not exist yet.

    Raises:
        DataError: more rows are bad than data.max_refused allows, or none is usable.
    """
    encoder, lengths = load_row_encoder(candidate)
    data = candidate.data.model_copy(update={"limit": None})
    ledger = Ledger(passed_over=[str(path) for path in wanted.sources.passed_over])
    writer = StoreWriter(folder)
    rows: dict[Key, RowSamples] = {}
    count = 0
    with writer:
        raw = read_wanted(candidate, wanted, draw)
        for row, shown in _label_twice(raw, encoder, candidate, lengths.max_seq_len, folder.parent):
            ledger.add(row)
            writer.add(row)
            if row.status == "used":
                replies = _find_replies(row, shown, count, encoder)
                is_cut = row.reason == "truncated"
                rows[row.file, row.number] = RowSamples(
                    row.where, count, len(row.samples), replies, *_tools(row), is_cut=is_cut
                )
                count += len(row.samples)
    ledger.raise_if_unusable(data.max_refused)
    return LabelledRows(candidate, encoder, lengths, open_store(folder), ledger, rows)


def _label_twice(
    raw: Iterable[RawRow], encoder: Encoder, candidate: Candidate, max_seq_len: int, folder: Path
) -> Iterator[tuple[LabelledRow, LabelledRow]]:
    """Each row as it is trained, and as it shows its replies: data.train_on all trains the questions too."""
    data = candidate.data.model_copy(update={"limit": None})
    if data.train_on != "all":
        for row in label_rows(raw, encoder, data, max_seq_len, folder=folder):
            yield row, row
        return
    one, other = itertools.tee(raw)
    assistant = data.model_copy(update={"train_on": "assistant"})
    yield from zip(
        label_rows(one, encoder, data, max_seq_len, folder=folder),
        label_rows(other, encoder, assistant, max_seq_len, folder=folder),
        strict=True,
    )


def _find_replies(row: LabelledRow, shown: LabelledRow, first: int, encoder: Encoder) -> tuple[ReplySpan, ...]:
    """The trained replies of a row that end with their stop token; raw text has none."""
    if shown.how in ("", "text") or len(row.samples) != len(shown.samples):
        return ()
    found = []
    for number, (trained, sample) in enumerate(zip(row.samples, shown.samples, strict=True), first):
        if np.array_equal(trained.input_ids, sample.input_ids):
            found += [ReplySpan(number, start, end) for start, end in find_stretches(sample, encoder)]
    return tuple(found)


def find_stretches(sample: Sample, encoder: Encoder) -> Iterator[tuple[int, int]]:
    """[start, end) of the supervised stretches of a sample that end with a stop token."""
    mask = np.concatenate([[0], sample.loss_mask.astype(np.int8), [0]])
    borders = np.flatnonzero(np.diff(mask))
    stops = {*encoder.stop_ids, encoder.eos_id}
    for start, end in zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True):
        if start > 0 and int(sample.input_ids[end - 1]) in stops:
            yield start, end


def _tools(row: LabelledRow) -> tuple[tuple[dict[str, Any], ...], bool]:
    """Schemas of a row's tools, and whether it has any or calls some."""
    if not isinstance(row.source, Conversation):
        return (), False
    has_calls = any(message.tool_calls for message in row.source.messages)
    return row.source.tools, bool(row.source.tools) or has_calls


def choose_common(labelled: Sequence[LabelledRows], draw: Draw | None, limit: int | None) -> tuple[list[Key], int]:
    """The rows to score, in the order of the data, which every model can be scored on; and how many there would be.

    Raises:
        DataError: there are none.
    """
    first, *others = labelled
    common = [key for key in first.rows if all(key in other.rows for other in others)]
    if not common:
        raise DataError(
            "no row can be scored by all models: each is refused for one of them. Evaluate them one by one, or see "
            "tunesmith check --model M for each.",
            code="no-common-rows",
        )
    usable = len(common)
    if limit is not None and draw is not None and usable > limit:
        numbers = draw.numbers
        kept = set(sorted(common, key=lambda key: numbers[key])[:limit])
        common = [key for key in common if key in kept]
    return common, usable


def summarise(
    labelled: Sequence[LabelledRows],
    keys: Sequence[Key],
    usable: int,
    draw: Draw | None,
    replies: int,
    sources: Sequence[str],
) -> DataSummary:
    """What became of the rows; reasons of models are joined."""
    refusals: dict[str, Refusal] = {}
    for one in labelled:
        for cause in one.ledger.refusals():
            rows = [name_row(file, number) for file, number in cause.rows]
            name = cause.text if len(labelled) == 1 else f"{one.candidate.name}: {cause.text}"
            refusals[name] = Refusal(name, cause.count, rows)
    looked_at = max(one.ledger.rows for one in labelled)
    total = draw.total if draw is not None else looked_at
    return DataSummary(list(sources), total, looked_at, usable, len(keys), replies, list(refusals.values()))
