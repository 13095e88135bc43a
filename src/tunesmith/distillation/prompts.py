"""Label the prompts exactly as training does, and keep them on disk: there may be more of them than fit in memory."""

from __future__ import annotations

import datetime
import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tunesmith.config.data_keys import DataSection, FieldsSection
from tunesmith.data.labelling import Labeller
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.distillation.questions import Question, add_system, read_questions
from tunesmith.distillation.settings import GenerateSettings
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.evaluation.candidates import Candidate, RowsToScore
from tunesmith.evaluation.rows import Draw, draw_rows, load_row_encoder, read_wanted
from tunesmith.rows.conversation import RowRefused, UnknownFormat
from tunesmith.sources.read import RawRow
from tunesmith.sources.rowsize import RowTooLarge

_TOGETHER = 256  # rows that are labelled at once
_NO_LIMIT = 2**31 - 1  # tokens: nothing is cut here; a prompt beyond the context gets no reply


class RowLabeller:
    """Label rows in the form of our output as training would: with the template, variables and keys of the model."""

    def __init__(self, encoder: Encoder, data: DataSection) -> None:
        own = {"format": "messages", "fields": FieldsSection(), "ignore_columns": [], "limit": None}
        kept = {"train_on": "assistant", "train_reasoning": True, "history": "auto", "overlong": "truncate"}
        section = data.model_copy(update=own | kept)
        self._labeller = Labeller(encoder, section, _NO_LIMIT, encoder.renderer())

    def label(self, rows: Iterable[RawRow]) -> Iterator[LabelledRow]:
        """The rows with their outcomes, in order."""
        return self._labeller.label(rows, set())


def begin_of_reply(row: LabelledRow) -> tuple[int, int]:
    """The sample of a labelled row with its last reply, and where that begins in it."""
    number = max(place for place, sample in enumerate(row.samples) if sample.num_targets)
    return number, int(np.flatnonzero(row.samples[number].loss_mask)[0])


@dataclass(frozen=True, eq=False)
class Prompts:
    """All questions with their prompts, in the order of the data.

    Attributes:
        store: token ids of each question's prompt.
        asked: numbers of the questions to answer; with a limit, of those drawn.
        occurrences: how often the same prompt came before.
        times: how often a prompt comes, by its digest.
        files: file -> digest of its questions.
        ledger: what became of each row.
        num_rows: rows that the questions to answer come from.
    """

    encoder: Encoder
    store: TokenStore
    asked: Sequence[int]
    digests: bytearray
    occurrences: array[int]
    times: Counter[bytes]
    files: dict[str, str]
    ledger: Ledger
    num_rows: int
    _lines: Path

    def ids(self, number: int) -> list[int]:
        found: list[int] = self.store[number].input_ids.tolist()
        return found

    def digest(self, number: int) -> bytes:
        """Of the prompt's ids."""
        return bytes(self.digests[16 * number : 16 * number + 16])

    def seed(self, number: int, sample: int, seed: int) -> int:
        """Of the random numbers of a sample; it depends on the prompt, not on the other rows or their order."""
        content = f"{seed} {self.occurrences[number]} {sample} ".encode() + self.digest(number)
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1

    def questions(self) -> Iterator[tuple[int, Question]]:
        """The questions to answer, each with its number."""
        with self._lines.open(encoding="utf-8") as file:
            wanted = iter(self.asked)
            number = next(wanted, None)
            for place, line in enumerate(file):
                if place == number:
                    yield place, Question.from_line(line)
                    number = next(wanted, None)


@dataclass(slots=True)
class _Row:
    """A row on its way: its questions, or why it has none."""

    raw: RawRow
    questions: Sequence[Question] = ()
    refusal: RowRefused | None = None


def label_prompts(candidate: Candidate, wanted: RowsToScore, settings: GenerateSettings, folder: Path) -> Prompts:
    """Read the rows, label their prompts, and find out which are to be answered.

    Args:
        folder: for the tokens and the questions.

    Raises:
        DataError: the first row of a file has an unknown format, more rows are bad than data.max_refused allows, or
            none can be answered.
    """
    encoder, _ = load_row_encoder(candidate)
    limit = settings.limit
    draw = draw_rows(candidate, wanted, limit, settings.seed) if limit is not None else None
    ledger = Ledger(passed_over=[str(path) for path in wanted.sources.passed_over])
    writer = _PromptWriter(folder)
    with writer:
        labeller = RowLabeller(encoder, candidate.data)
        rows = _read_rows(read_wanted(candidate, wanted, draw), candidate.data, settings)
        for row, outcome, questions in _label(rows, labeller):
            ledger.add(outcome)
            for question, labelled in questions:
                writer.add(row, question, labelled)
    ledger.raise_if_unusable(candidate.data.max_refused)
    asked = _choose(writer, draw, limit)
    num_rows = len(set(map(writer.key, asked))) if limit is not None else ledger.used
    return Prompts(
        encoder, open_store(folder / "tokens"), asked, writer.digests, writer.occurrences, writer.times,
        writer.digest_files(asked), ledger, num_rows, writer.lines,
    )  # fmt: skip


def _read_rows(raw: Iterable[RawRow], data: DataSection, settings: GenerateSettings) -> Iterator[_Row]:
    seen: set[str] = set()
    for row in raw:
        if isinstance(row.value, RowTooLarge):
            yield _Row(row, refusal=RowRefused(row.value.reason, code="row-too-large"))
            continue
        parsed = row.parsed()
        is_first = row.file not in seen
        seen.add(row.file)
        try:
            questions = read_questions(row.where, parsed.value, data, settings.replies)
            yield _Row(row, [add_system(question, settings.system) for question in questions])
        except UnknownFormat as refusal:
            if is_first:
                raise DataError(f"{row.where}: {refusal.reason}", code="format-unknown") from None
            yield _Row(row, refusal=refusal)
        except RowRefused as refusal:
            yield _Row(row, refusal=refusal)


Labelled = tuple[Question, LabelledRow]


def _label(rows: Iterable[_Row], labeller: RowLabeller) -> Iterator[tuple[RawRow, LabelledRow, list[Labelled]]]:
    """Each row with its outcome and its questions that can be asked. A row is used if one of them can."""
    waiting = iter(rows)
    while some := list(itertools.islice(waiting, _TOGETHER)):
        asked = [(row.raw, question) for row in some for question in row.questions]
        found = labeller.label(RawRow(raw.file, raw.number, question.prompt_row()) for raw, question in asked)
        for row in some:
            labelled = [(question, next(found)) for question in row.questions]
            usable = [(question, one) for question, one in labelled if one.status == "used"]
            yield row.raw, _outcome(row, labelled, usable), usable
        assert next(found, None) is None


def _outcome(row: _Row, labelled: Sequence[Labelled], usable: Sequence[Labelled]) -> LabelledRow:
    file, number = row.raw.file, row.raw.number
    if row.refusal is not None:
        refusal = row.refusal
        return LabelledRow(
            file, number, "refused", "", refusal.reason, is_by_choice=refusal.by_choice,
            loses_context=refusal.loses_context, code=refusal.code,
        )  # fmt: skip
    if not usable:
        return replace(labelled[0][1], samples=(), source=None, raw=None)
    notes = tuple(dict.fromkeys(note for _, one in usable for note in one.notes))
    return LabelledRow(file, number, "used", usable[0][1].how, notes=notes)


class _PromptWriter:
    """Write prompts and questions to disk, and note what is needed of each in memory."""

    def __init__(self, folder: Path) -> None:
        self.lines = folder / "questions.jsonl"
        self.names: dict[str, int] = {}
        self._files: list[str] = []
        self._file_numbers, self._row_numbers = array("l"), array("q")
        self.digests, self.occurrences, self.times = bytearray(), array("l"), Counter[bytes]()
        self._store = StoreWriter(folder / "tokens")
        self._contents = bytearray()

    def __enter__(self) -> _PromptWriter:
        self._store.__enter__()
        self._file = self.lines.open("w", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._store.__exit__(*error)  # type: ignore[arg-type]

    def add(self, row: RawRow, question: Question, labelled: LabelledRow) -> None:
        place, start = begin_of_reply(labelled)
        sample = labelled.samples[place]
        prompt = replace(sample, input_ids=sample.input_ids[:start], loss_mask=sample.loss_mask[:start])
        self._store.add(replace(labelled, samples=(prompt,)))
        line = question.to_line()
        self._file.write(f"{line}\n")
        digest = hashlib.blake2b(prompt.input_ids.astype(np.uint32).tobytes(), digest_size=16).digest()
        self.digests += digest
        self.occurrences.append(self.times[digest])
        self.times[digest] += 1
        self._contents += hashlib.blake2b(line.encode(), digest_size=16).digest()
        if row.file not in self.names:
            self.names[row.file] = len(self.names)
            self._files.append(row.file)
        self._file_numbers.append(self.names[row.file])
        self._row_numbers.append(row.number)

    def key(self, number: int) -> tuple[str, int]:
        """File and row number of a question."""
        return self._files[self._file_numbers[number]], self._row_numbers[number]

    def digest_files(self, asked: Sequence[int]) -> dict[str, str]:
        """File -> digest of its questions to be answered, in order."""
        digests: dict[int, hashlib.blake2b] = {}
        for number in asked:
            digest = digests.setdefault(self._file_numbers[number], hashlib.blake2b(digest_size=16))
            digest.update(self._contents[16 * number : 16 * number + 16])
        return {self._files[file]: digest.hexdigest() for file, digest in digests.items()}


def _choose(writer: _PromptWriter, draw: Draw | None, limit: int | None) -> Sequence[int]:
    """Numbers of the questions of the rows that are drawn first."""
    if draw is None or limit is None:
        return range(len(writer.occurrences))
    keys = [writer.key(number) for number in range(len(writer.occurrences))]
    rows = sorted(set(keys), key=lambda key: draw.numbers[key])
    kept = set(rows[:limit])
    return [number for number, key in enumerate(keys) if key in kept]


def today(text: str | None) -> datetime.datetime:
    """The date for templates that print it: of the first start, where there was one."""
    return datetime.datetime.fromisoformat(text) if text else datetime.datetime.now()
