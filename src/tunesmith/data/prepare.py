"""From files to labelled rows, in batches that the tokenizer encodes on all cores at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tunesmith.config.schema import DataSection
from tunesmith.data.fit import fit_samples
from tunesmith.data.labels import (
    NOTE_UNKNOWN,
    REFUSED_INEXACT,
    BorderGlued,
    Sample,
    join_completion,
    label_chat,
    label_completion,
    label_reply,
    label_segments,
    label_text,
    train_all,
    trains_unknown,
)
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.patterns import Planned, Planner
from tunesmith.encode.blocks import read_blocks
from tunesmith.encode.call_ids import add_call_ids, lacks_call_ids
from tunesmith.encode.encoder import Encoder, Encoding
from tunesmith.encode.render import RenderedChat, render_chat
from tunesmith.errors import DataError
from tunesmith.rows.conversation import Conversation, Parsed, RawText, RowRefused, Segments, UnknownFormat
from tunesmith.rows.formats import parse_row
from tunesmith.rows.hints import find_rendered_template
from tunesmith.sources.read import RawRow
from tunesmith.sources.rowsize import RowTooLarge

_BATCH_ROWS = 256

NOTE_CONTROL = "spells control tokens in its text, kept as plain text (other programs would read control tokens)"
NOTE_CONTROL_ALLOWED = "spells control tokens in its text, which become these tokens (data.control_text allow)"
NOTE_RENDERED = "raw text that already holds a rendered chat template; every token of it is trained, the questions too"
REFUSED_CONTROL = "spells a control token in its text (data.control_text refuse)"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on its way: parsed and rendered or planned (the first ones both), or already refused.

    Attributes:
        texts: what has to be encoded for it, stretches of a plan excepted.
    """

    row: RawRow
    texts: tuple[str, ...] = ()
    rendered: RenderedChat | None = None
    planned: Planned | None = None
    notes: tuple[str, ...] = ()
    refusal: RowRefused | None = None
    source: Parsed | None = None


Stretches = Mapping[str, npt.NDArray[np.uint32]]


def label_rows(rows: Iterable[RawRow], encoder: Encoder, data: DataSection, max_seq_len: int) -> Iterator[LabelledRow]:
    """Every row with its outcome, in order.

    Raises:
        DataError: the first row of a file has no known format.
    """
    seen_files: set[str] = set()
    rows = itertools.islice(rows, data.limit) if data.limit else iter(rows)
    may_plan = encoder.template is not None and data.history == "auto" and data.train_on != "last_assistant"
    labeller = _Labeller(encoder, data, max_seq_len, Planner(encoder, data.train_reasoning) if may_plan else None)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        drafts = []
        for row in batch:
            is_first = row.file not in seen_files and not isinstance(row.value, RowTooLarge)
            if is_first:
                seen_files.add(row.file)
            drafts.append(labeller.draft(row, is_first))
        yield from labeller.finish(drafts)


class _Labeller:
    """What turns rows into labelled rows: an encoder, the config, and plans for chats that are alike."""

    def __init__(self, encoder: Encoder, data: DataSection, max_seq_len: int, planner: Planner | None) -> None:
        self.encoder, self.data, self.max_seq_len, self.planner = encoder, data, max_seq_len, planner

    def draft(self, row: RawRow, is_first: bool) -> _Draft:
        if isinstance(row.value, RowTooLarge):
            return _Draft(row, refusal=RowRefused(row.value.reason))
        try:
            parsed = parse_row(row.value, self.data.format, self.data.fields, self.data.ignore_columns)
            return replace(self._draft_parsed(row, parsed), source=parsed)
        except UnknownFormat as refusal:
            if is_first:  # the whole file is of a kind that we cannot train on
                raise DataError(f"{row.where}: {refusal.reason}") from None
            return _Draft(row, refusal=refusal)
        except RowRefused as refusal:
            return _Draft(row, refusal=refusal)

    def _draft_parsed(self, row: RawRow, parsed: Parsed) -> _Draft:
        if isinstance(parsed, RawText):
            text, notes = _shield_text(parsed.text, self.encoder)
            notes = (NOTE_RENDERED, *notes) if find_rendered_template(parsed.text) else notes
            return _Draft(row, (text,), notes=(*parsed.notes, *notes))
        if isinstance(parsed, Segments):
            return _Draft(row, tuple(_segment_texts(parsed, self.encoder)), notes=parsed.notes)
        return self._draft_chat(row, parsed)

    def _draft_chat(self, row: RawRow, conversation: Conversation) -> _Draft:
        encoder = self.encoder
        if encoder.template is not None:
            messages = read_blocks(conversation.messages, encoder.template)
            conversation = replace(conversation, messages=messages)
            if encoder.template.habits.needs_ids and lacks_call_ids(conversation):
                conversation = add_call_ids(conversation)
        conversation, notes = _shield_chat(conversation, encoder)
        if encoder.template is None:
            prompt, completion = join_completion(conversation)
            return _Draft(row, (prompt, prompt + completion), notes=notes)
        planned = self.planner.plan(conversation) if self.planner else None
        if planned and self.planner and not self.planner.wants_comparison(planned):
            return _Draft(row, planned=planned, notes=notes)
        rendered = self._render(conversation)
        texts = tuple(part.text for part in rendered.parts)
        return _Draft(row, texts, rendered, planned, notes=(*notes, *rendered.notes))

    def _render(self, conversation: Conversation) -> RenderedChat:
        assert self.encoder.template is not None
        history = "last_turn" if self.data.train_on == "last_assistant" else self.data.history
        stops, reasoning = self.encoder.stops, self.data.train_reasoning
        return render_chat(conversation, self.encoder.template, stops, history, reasoning)

    def finish(self, drafts: list[_Draft]) -> Iterator[LabelledRow]:
        """Rows of a batch, all of its texts encoded together."""
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
            if not all(encoding.is_exact for encoding in encodings):
                raise RowRefused(REFUSED_INEXACT)
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
            by_choice, loses = refusal.by_choice, refusal.loses_context
            return LabelledRow(
                file, number, "refused", "", refusal.reason, notes=notes, is_by_choice=by_choice, loses_context=loses
            )
        notes, lost = (*notes, *fitted.notes), fitted.tokens_lost
        return LabelledRow(file, number, "used", how, fitted.reason, fitted.samples, lost, notes, source=draft.source)

    def _label(self, draft: _Draft, encodings: list[Encoding], stretches: Stretches) -> tuple[str, list[Sample]]:
        """How the row's samples came about, and they themselves."""
        if isinstance(draft.source, RawText):
            return "text", list(label_text(encodings[0], self.encoder, self.max_seq_len))
        if isinstance(draft.source, Segments):
            return "segments", [label_segments(draft.source, encodings, self.encoder)]
        if draft.planned and self.planner:
            samples = self.planner.label(draft.planned, stretches) if self.planner.is_trusted else None
            if draft.rendered is None and samples is not None:
                return draft.planned.plan.how, samples
            rendered, encodings = draft.rendered, encodings
            if rendered is None:  # its plan does not hold, so it is rendered as any other
                return self._label_alone(draft)
            how, proven = self._label_rendered(rendered, encodings)
            self.planner.compare(samples, proven)
            return how, proven
        if draft.rendered is None:
            return "joined", [label_completion(encodings[0], encodings[1], self.encoder)]
        return self._label_rendered(draft.rendered, encodings)

    def _label_alone(self, draft: _Draft) -> tuple[str, list[Sample]]:
        assert isinstance(draft.source, Conversation)
        assert self.encoder.template is not None
        rendered = self._render(
            replace(draft.source, messages=read_blocks(draft.source.messages, self.encoder.template))
        )
        return self._label_rendered(rendered, self.encoder.encode_texts([part.text for part in rendered.parts]))

    def _label_rendered(self, rendered: RenderedChat, encodings: list[Encoding]) -> tuple[str, list[Sample]]:
        parts, encoder = rendered.parts, self.encoder
        try:
            pairs = zip(parts, encodings, strict=True)
            return rendered.how, [label_chat(part, encoding, encoder) for part, encoding in pairs]
        except BorderGlued:
            return "composed", [label_reply(part, span, encoder) for part in parts for span in part.spans]


def _shield_chat(conversation: Conversation, encoder: Encoder) -> tuple[Conversation, tuple[str, ...]]:
    """The conversation as data.control_text wants it, and its notes."""
    marked, is_marked = encoder.shield.mark_conversation(conversation)
    if not is_marked:
        return conversation, conversation.notes
    if encoder.control_text == "allow":
        return conversation, (*conversation.notes, NOTE_CONTROL_ALLOWED)
    if encoder.control_text == "refuse":
        raise RowRefused(REFUSED_CONTROL)
    return marked, (*conversation.notes, NOTE_CONTROL)


def _shield_text(text: str, encoder: Encoder) -> tuple[str, tuple[str, ...]]:
    marked = encoder.shield.mark(text)
    if marked == text:
        return text, ()
    if encoder.control_text == "allow":
        return text, (NOTE_CONTROL_ALLOWED,)
    if encoder.control_text == "refuse":
        raise RowRefused(REFUSED_CONTROL)
    return marked, (NOTE_CONTROL,)


def _segment_texts(segments: Segments, encoder: Encoder) -> Iterator[str]:
    """The pieces of a rendered text. They spell control tokens on purpose, which a person has to say."""
    for text, _ in segments.parts:
        if encoder.control_text != "allow" and encoder.shield.mark(text) != text:
            raise RowRefused("its segments spell control tokens; --data.control_text allow lets them be these tokens")
        yield text
