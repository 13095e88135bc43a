"""Label rows in batches, so that the tokenizer encodes them on all cores."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunesmith.chat_template.habits import find_empty_think
from tunesmith.chat_template.template import Renderer, RenderSettings
from tunesmith.config.data_keys import DataSection
from tunesmith.data.fit import fit_samples
from tunesmith.data.labels import (
    NOTE_UNKNOWN,
    REFUSED_INEXACT,
    Sample,
    join_completion,
    label_blocks,
    label_completion,
    label_rendered,
    label_segments,
    label_text,
    train_all,
    trains_unknown,
)
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.patterns import Planned, Planner
from tunesmith.display import one_line
from tunesmith.encode.draws import UNCHANGED, RowDraws, add_system_prompt
from tunesmith.encode.empty_think import find_unreasoned, remove_empty_think
from tunesmith.encode.encoder import Encoder, Encoding
from tunesmith.encode.messages import prepare_messages, prepare_text
from tunesmith.encode.render import RenderedChat, render_chat
from tunesmith.errors import DataError
from tunesmith.rows.conversation import Conversation, Message, Parsed, RawText, RowRefused, Segments, UnknownFormat
from tunesmith.rows.formats import parse_document, refuse_lone_surrogates
from tunesmith.rows.textmarks import NOTE_TRANSCRIPT_TEXT, TextScan, find_rendered_template
from tunesmith.sources.read import RawRow
from tunesmith.sources.rowsize import RowTooLarge
from tunesmith.sources.textfile import LongText

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 21  # a row of raw text may be a whole book
_ASKED = Conversation((Message("user", "Hello."), Message("assistant", "Hello.")))
_SHOWN = 60  # characters of a system prompt in an error

NOTE_RENDERED = (
    "raw text that already contains a rendered chat template; all of its tokens are trained, questions included"
)


@dataclass(frozen=True, slots=True)
class _Chat:
    """A chat ready for rendering, and the turns whose empty think blocks are to be removed."""

    conversation: Conversation
    bare_turns: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before encoding: parsed and rendered or planned, or already refused.

    Attributes:
        texts: texts to encode for it, except the stretches of a plan.
        chat: of a planned row, as it is rendered.
        system_prompt: drawn for it.
        loses_think: whether an empty think block is removed from it.
        long_text: a document that is read and encoded block by block, in place of `texts`.
    """

    row: RawRow
    texts: tuple[str, ...] = ()
    rendered: RenderedChat | None = None
    planned: Planned | None = None
    chat: _Chat | None = None
    notes: tuple[str, ...] = ()
    system_prompt: str | None = None
    loses_think: bool = False
    refusal: RowRefused | None = None
    source: Parsed | None = None
    long_text: LongText | None = None

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.texts)) + (len(self.long_text.head) if self.long_text else 0)


Stretches = Mapping[str, npt.NDArray[np.uint32]]


def label_rows(
    rows: Iterable[RawRow],
    encoder: Encoder,
    data: DataSection,
    max_seq_len: int,
    settings: RenderSettings | None = None,
    folder: Path | None = None,
    draws: RowDraws | None = None,
    known_files: Collection[str] = (),
) -> Iterator[LabelledRow]:
    """Yield every row with its outcome, in order. A row's outcome does not depend on the rows before it.

    Args:
        settings: date and template variables; by default the encoder's.
        folder: for temporary files of long documents; by default the system's.
        draws: what is drawn for training rows; rows for evaluation have none.
        known_files: names of files whose format is known to be one of ours, so that a row of none is only refused.

    Raises:
        DataError: the first row of a file has an unknown format, or the template rejects a drawn system prompt.
    """
    rows = itertools.islice(rows, data.limit) if data.limit else rows
    yield from Labeller(encoder, data, max_seq_len, encoder.renderer(settings), folder, draws).label(
        rows, set(known_files)
    )


def begins_file(row: RawRow, seen_files: set[str]) -> bool:
    """Whether the row is the first of its file whose format shows; `seen_files` has the others and is added to."""
    if row.file in seen_files or isinstance(row.value, RowTooLarge):
        return False
    seen_files.add(row.file)
    return True


def _draft_batches(rows: Iterable[RawRow], labeller: Labeller, seen_files: set[str]) -> Iterator[list[_Draft]]:
    drafts: list[_Draft] = []
    num_characters = 0
    for row in rows:
        draft = labeller.draft(row.parsed(), begins_file(row, seen_files))
        drafts.append(draft)
        num_characters += draft.num_characters
        if len(drafts) == _BATCH_ROWS or num_characters >= _BATCH_CHARACTERS:
            yield drafts
            drafts, num_characters = [], 0
    if drafts:
        yield drafts


class Labeller:
    """Label rows with one encoder, config, template (under the run's settings) and its plans.

    What it keeps between rows saves time and decides nothing, so that any part of the rows may go to any labeller.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: DataSection,
        max_seq_len: int,
        renderer: Renderer | None,
        folder: Path | None = None,
        draws: RowDraws | None = None,
    ) -> None:
        self.encoder, self.data, self.max_seq_len, self.renderer = encoder, data, max_seq_len, renderer
        self.folder, self.draws = folder, draws
        may_plan = renderer is not None and data.history == "auto" and data.train_on != "last_assistant"
        self.planner = Planner(encoder, renderer, data.train_reasoning) if renderer and may_plan else None
        removes = renderer is not None and draws is not None and draws.empty_think_share < 1
        self.empty_think = find_empty_think(renderer) if renderer and removes else None
        self.bare_planner: Planner | None = None
        if self.planner and self.empty_think:
            self.bare_planner = Planner(encoder, self.planner.renderer, data.train_reasoning, self.empty_think)
        self._taken: set[str] = set()  # system prompts that the template takes

    def label(self, rows: Iterable[RawRow], seen_files: set[str]) -> Iterator[LabelledRow]:
        """Yield every row with its outcome, in order.

        Args:
            seen_files: files of which a row has been labelled before; added to.

        Raises:
            DataError: as `label_rows`.
        """
        for drafts in _draft_batches(rows, self, seen_files):
            yield from self.finish(drafts)

    def draft(self, row: RawRow, is_first: bool) -> _Draft:
        if isinstance(row.value, RowTooLarge):
            return _Draft(row, refusal=RowRefused(row.value.reason, code="row-too-large"))
        parsed: Parsed | None = None
        data = self.data
        try:
            parsed, long_text = parse_document(row.value, data.format, data.fields, data.ignore_columns)
            if long_text:
                return _Draft(row, notes=parsed.notes, source=parsed, long_text=long_text)
            return self._draft_parsed(row, parsed)
        except UnknownFormat as refusal:
            if is_first:  # then the whole file has a format that cannot be trained on
                raise DataError(f"{row.where}: {refusal.reason}", code="format-unknown") from None
            return _Draft(row, refusal=refusal)
        except RowRefused as refusal:
            return _Draft(row, refusal=refusal, source=parsed)

    def _draft_parsed(self, row: RawRow, parsed: Parsed) -> _Draft:
        if isinstance(parsed, RawText):
            text, notes = prepare_text(parsed.text, self.encoder.shield, self.encoder.control_text)
            notes = (NOTE_RENDERED, *notes) if find_rendered_template(parsed.text) else notes
            return _Draft(row, (text,), notes=(*parsed.notes, *notes), source=parsed)
        if isinstance(parsed, Segments):
            return _Draft(row, tuple(_segment_texts(parsed, self.encoder)), notes=parsed.notes, source=parsed)
        return self._draft_chat(row, parsed)

    def _draft_chat(self, row: RawRow, source: Conversation) -> _Draft:
        read, draw = source, self.draws.draw(row.number, source) if self.draws else UNCHANGED
        if draw.system_prompt is not None:
            self._require_taken(draw.system_prompt)
            read = add_system_prompt(read, draw.system_prompt)
        conversation = self._prepare(read)
        notes = conversation.notes
        if self.renderer is None:
            prompt, completion = join_completion(conversation)
            return _Draft(row, (prompt, prompt + completion), notes=notes, source=source)
        loses = not draw.keeps_empty_think and self.empty_think is not None
        chat = _Chat(conversation, find_unreasoned(read.messages, conversation.messages) if loses else frozenset())
        planner = self._planner_of(chat)
        if planner and (planned := planner.plan(conversation)):
            return _Draft(
                row, planned=planned, chat=chat, notes=notes, system_prompt=draw.system_prompt,
                loses_think=planner.has_block(conversation), source=source,
            )  # fmt: skip
        rendered, loses_think = self._render(chat)
        return _Draft(
            row, tuple([part.text for part in rendered.parts]), rendered, notes=(*notes, *rendered.notes),
            system_prompt=draw.system_prompt, loses_think=loses_think, source=source,
        )  # fmt: skip

    def _prepare(self, conversation: Conversation) -> Conversation:
        habits = self.renderer.habits if self.renderer else None
        return prepare_messages(conversation, habits, self.encoder.shield, self.encoder.control_text)

    def _planner_of(self, chat: _Chat) -> Planner | None:
        """The planner for a chat; None if some of its turns lose their empty think blocks and others keep them."""
        if not chat.bare_turns:
            return self.planner
        turns = {turn for turn, message in enumerate(chat.conversation.messages) if message.role == "assistant"}
        return self.bare_planner if turns == chat.bare_turns else None

    def _render(self, chat: _Chat) -> tuple[RenderedChat, bool]:
        """The row's texts, and whether they lack an empty think block that the template writes."""
        assert self.renderer is not None
        history = "last_turn" if self.data.train_on == "last_assistant" else self.data.history
        written = render_chat(chat.conversation, self.renderer, self.encoder.stops, history, self.data.train_reasoning)
        if not chat.bare_turns or self.empty_think is None:
            return written, False
        rendered = remove_empty_think(written, self.empty_think, chat.bare_turns, history)
        return rendered, rendered is not written

    def _require_taken(self, system_prompt: str) -> None:
        """Check once that the template takes a system prompt, so that it does not refuse the rows it is drawn for.

        Raises:
            DataError: with the template's reason.
        """
        if system_prompt in self._taken or self.renderer is None:
            return
        try:
            chat = self._prepare(add_system_prompt(_ASKED, system_prompt))
            render_chat(chat, self.renderer, self.encoder.stops)
        except RowRefused as refusal:
            shown = system_prompt if len(system_prompt) <= _SHOWN else f"{system_prompt[:_SHOWN]}..."
            raise DataError(
                f"data.system_prompts: {one_line(shown)!r} cannot be added: {refusal.reason}. Leave it out, or choose "
                "another template with --data.chat_template.",
                code="system-prompt-refused",
            ) from None
        self._taken.add(system_prompt)

    def finish(self, drafts: list[_Draft]) -> Iterator[LabelledRow]:
        """Label the rows of a batch; all of its texts are encoded together."""
        encodings = iter(self.encoder.encode_texts([text for draft in drafts for text in draft.texts]))
        planned = (text for draft in drafts if draft.planned for text in draft.planned.stretches)
        stretches = self.planner.encode(planned) if self.planner else {}
        for draft in drafts:
            yield self._finish_row(draft, list(itertools.islice(encodings, len(draft.texts))), stretches)

    def _finish_row(self, draft: _Draft, encodings: list[Encoding], stretches: Stretches) -> LabelledRow:
        file, number, notes = draft.row.file, draft.row.number, draft.notes
        try:
            if draft.refusal:
                raise draft.refusal
            if draft.long_text:
                return self._finish_document(draft, draft.long_text)
            if not all(encoding.is_exact for encoding in encodings):
                raise RowRefused(REFUSED_INEXACT, code="control-text-inexact")
            how, labelled = self._label(draft, encodings, stretches)
            if trains_unknown(labelled, self.encoder):
                notes = (*notes, NOTE_UNKNOWN)
            if how == "text":
                reason = "split" if len(labelled) > 1 else ""
                return LabelledRow(file, number, "used", how, reason, tuple(labelled), notes=notes, source=draft.source)
            if self.data.train_on == "all":
                labelled = [train_all(sample) for sample in labelled]
            fitted = fit_samples(labelled, self.data.overlong, self.max_seq_len, draft.row.where)
        except RowRefused as refusal:
            return LabelledRow(
                file, number, "refused", "", refusal.reason, notes=notes, is_by_choice=refusal.by_choice,
                loses_context=refusal.loses_context, source=draft.source, code=refusal.code, raw=draft.row.value,
            )  # fmt: skip
        return LabelledRow(
            file, number, "used", how, fitted.reason, fitted.samples, fitted.tokens_lost, (*notes, *fitted.notes),
            source=draft.source, num_cut=fitted.num_cut, system_prompt=draft.system_prompt,
            loses_think=draft.loses_think,
        )  # fmt: skip

    def _finish_document(self, draft: _Draft, document: LongText) -> LabelledRow:
        """Label a document without holding its text.

        Raises:
            RowRefused: as for a text in memory.
        """
        assert isinstance(draft.source, RawText)
        scan, digest = TextScan(), hashlib.sha256()

        def blocks() -> Iterator[str]:
            for block in document.blocks():
                refuse_lone_surrogates(block)
                scan.add(block)
                digest.update(block.encode())
                yield block

        samples, control_notes = label_blocks(blocks(), self.encoder, self.max_seq_len, self.folder)
        notes = dict.fromkeys(draft.notes)
        for note, is_due in ((NOTE_TRANSCRIPT_TEXT, scan.is_transcript), (NOTE_RENDERED, scan.has_rendered)):
            notes |= {note: None} if is_due else {}
        notes |= dict.fromkeys(control_notes)
        if trains_unknown(samples, self.encoder):
            notes[NOTE_UNKNOWN] = None
        source = replace(draft.source, digest=digest.hexdigest())
        reason = "split" if len(samples) > 1 else ""
        return LabelledRow(draft.row.file, draft.row.number, "used", "text", reason, samples,
                           notes=tuple(notes), source=source)  # fmt: skip

    def _label(self, draft: _Draft, encodings: list[Encoding], stretches: Stretches) -> tuple[str, list[Sample]]:
        """How the row's samples were made ("as_rendered", ...), and the samples."""
        if isinstance(draft.source, RawText):
            return "text", list(label_text(encodings[0], self.encoder, self.max_seq_len))
        if isinstance(draft.source, Segments):
            return "segments", [label_segments(draft.source, encodings, self.encoder)]
        if draft.planned and self.planner:
            samples = self.planner.label(draft.planned, stretches)
            return (draft.planned.plan.how, samples) if samples is not None else self._label_alone(draft)
        if draft.rendered is None:
            return "joined", [label_completion(encodings[0], encodings[1], self.encoder)]
        return label_rendered(draft.rendered, encodings, self.encoder)

    def _label_alone(self, draft: _Draft) -> tuple[str, list[Sample]]:
        """Label the row without its plan, which does not hold for this row's tokens."""
        assert draft.chat is not None
        rendered, _ = self._render(draft.chat)
        encodings = self.encoder.encode_texts([part.text for part in rendered.parts])
        return label_rendered(rendered, encodings, self.encoder)


def _segment_texts(segments: Segments, encoder: Encoder) -> Iterator[str]:
    """The pieces of a rendered text. They contain control tokens on purpose, which data.control_text must allow."""
    for text, _ in segments.parts:
        if encoder.control_text != "allow" and encoder.shield.mark(text) != text:
            raise RowRefused(
                "its segments spell control tokens. To encode them as such: --data.control_text allow",
                code="segments-control-text",
            )
        yield text
