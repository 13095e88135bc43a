"""The way from files to labelled rows, in batches that the tokenizer encodes on all cores at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tunesmith.config import DataSection
from tunesmith.data.conversation import Conversation, RawText, RowRefused, UnknownFormat
from tunesmith.data.encode import Encoder, Encoding
from tunesmith.data.formats import parse_row
from tunesmith.data.hints import find_rendered_template
from tunesmith.data.labels import (
    Rendered,
    Sample,
    join_completion,
    label_chat,
    label_completion,
    label_text,
    render_chat,
    truncate,
)
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.read import RawRow
from tunesmith.errors import DataError

_BATCH_ROWS = 256

NOTE_CONTROL = "holds control tokens in its text, which are encoded as such"
NOTE_RENDERED = "raw text that already holds a rendered chat template; every token of it is trained, the questions too"
NOTE_CUT_REPLY = "its last reply is cut before the stop token"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on its way: parsed and rendered, or already refused."""

    row: RawRow
    texts: tuple[str, ...] = ()
    rendered: Rendered | None = None
    is_text: bool = False
    notes: tuple[str, ...] = ()
    refusal: RowRefused | None = None


def label_rows(rows: Iterable[RawRow], encoder: Encoder, data: DataSection, max_seq_len: int) -> Iterator[LabelledRow]:
    """Every row with its outcome, in order.

    Raises:
        DataError: the first row of a file has no known format.
    """
    seen_files: set[str] = set()
    rows = itertools.islice(rows, data.limit) if data.limit else rows
    for batch in _batches(rows):
        drafts = []
        for row in batch:
            is_first = row.file not in seen_files
            seen_files.add(row.file)
            drafts.append(_draft_row(row, encoder, data, is_first))
        encodings = iter(encoder.encode_texts([text for draft in drafts for text in draft.texts]))
        for draft in drafts:
            yield _finish_row(draft, list(itertools.islice(encodings, len(draft.texts))), encoder, data, max_seq_len)


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield batch


def _draft_row(row: RawRow, encoder: Encoder, data: DataSection, is_first: bool) -> _Draft:
    try:
        parsed = parse_row(row.value, data.format, data.fields)
        if isinstance(parsed, RawText):
            has_control = encoder.holds_control_text(parsed.text)
            notes = (NOTE_CONTROL,) if has_control else ()
            notes = (NOTE_RENDERED,) if find_rendered_template(parsed.text) else notes
            return _Draft(row, (parsed.text,), is_text=True, notes=notes)
        return _draft_chat(row, parsed, encoder)
    except UnknownFormat as refusal:
        if is_first:  # the whole file is of a kind that we cannot train on
            raise DataError(f"{row.where}: {refusal.reason}") from None
        return _Draft(row, refusal=refusal)
    except RowRefused as refusal:
        return _Draft(row, refusal=refusal)


def _draft_chat(row: RawRow, conversation: Conversation, encoder: Encoder) -> _Draft:
    notes = conversation.notes
    if any(encoder.holds_control_text(f"{m.content}\n{m.reasoning_content}") for m in conversation.messages):
        notes += (NOTE_CONTROL,)
    if encoder.template is None:
        prompt, completion = join_completion(conversation)
        return _Draft(row, (prompt, prompt + completion), notes=notes)
    rendered = render_chat(conversation, encoder.template, encoder.stop.text)
    return _Draft(row, tuple(rendered.texts), rendered=rendered, notes=notes)


def _finish_row(
    draft: _Draft, encodings: list[Encoding], encoder: Encoder, data: DataSection, max_seq_len: int
) -> LabelledRow:
    file, number = draft.row.file, draft.row.number
    try:
        if draft.refusal:
            raise draft.refusal
        if draft.is_text:
            pieces = tuple(label_text(encodings[0], encoder, max_seq_len))
            reason = "split" if len(pieces) > 1 else ""
            return LabelledRow(file, number, "used", "text", reason, pieces, notes=draft.notes)
        if draft.rendered is None:
            how, sample = "joined", label_completion(encodings[0], encodings[1], encoder)
        else:
            how, sample = "as_rendered", label_chat(draft.rendered, encodings, encoder.stop.id)
        sample, lost, notes = _fit(sample, data, max_seq_len)
    except RowRefused as refusal:
        return LabelledRow(
            file, number, "refused", reason=refusal.reason, notes=draft.notes, is_by_choice=refusal.by_choice
        )
    reason = "truncated" if lost else ""
    return LabelledRow(file, number, "used", how, reason, (sample,), lost, (*draft.notes, *notes))


def _fit(sample: Sample, data: DataSection, max_seq_len: int) -> tuple[Sample, int, tuple[str, ...]]:
    """The sample within max_seq_len, the tokens lost, and a note where a reply lost its end."""
    length = len(sample.input_ids)
    if length <= max_seq_len:
        return sample, 0, ()
    if data.overlong == "refuse":
        raise RowRefused(f"is {length} tokens long and data.max_seq_len is {max_seq_len}")
    kept, lost = truncate(sample, max_seq_len)
    if not kept.num_targets:
        raise RowRefused(f"is {length} tokens long, and every trained token lies beyond data.max_seq_len {max_seq_len}")
    # trained on both sides of the cut means that the cut goes through a reply (stop tokens end a run of 1s)
    is_cut = bool(kept.loss_mask[-1] and sample.loss_mask[max_seq_len])
    return kept, lost, (NOTE_CUT_REPLY,) if is_cut else ()
