"""Decide which tokens are trained: the assistant's reply and its stop token, and nothing else.

If the ids before a reply are not the ids of its prompt, the row is refused: it would train the model on a prompt that
it never gets at inference.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from tunesmith.chat_template.trace import Place
from tunesmith.encode.encoder import Encoder, Encoding
from tunesmith.encode.longtext import IdFile, encode_blocks
from tunesmith.encode.messages import prepare_text
from tunesmith.encode.render import Rendered, RenderedChat, Span
from tunesmith.rows.conversation import Conversation, RowRefused, Segments

NOTE_UNKNOWN = "trains the tokenizer's unknown token, which replaces characters that it cannot encode"
REFUSED_INEXACT = "spells a control token where this tokenizer may not keep it as plain text. Remove it from the text"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Token ids and a loss_mask of the same length: 1 = trained, 0 = context."""

    input_ids: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]

    @property
    def num_targets(self) -> int:
        """Number of trained tokens, without a trained first token, which has nothing to be predicted from."""
        return int(self.loss_mask[1:].sum())

    @property
    def num_replies(self) -> int:
        """Stretches of trained tokens."""
        return int((self.loss_mask[1:] > self.loss_mask[:-1]).sum()) + int(self.loss_mask[0])


class BorderGlued(RowRefused):
    """A token spans the end of the prompt and the start of the reply, so inference would see other ids."""

    def __init__(self, turn: int) -> None:
        super().__init__(
            f"turn {turn} (assistant): a token spans the border between the prompt and the reply", code="border-glued"
        )


def label_chat(rendered: Rendered, whole: Encoding, encoder: Encoder) -> Sample:
    """ids and loss_mask of a rendered chat.

    Args:
        whole: encoding of `rendered.text`.

    Raises:
        BorderGlued: a token spans prompt and reply; `label_reply` then gives each reply a separate sample.
        RowRefused: a reply's stop text is not one token, or text of the row became a control token.
    """
    _refuse_control_tokens(whole, rendered.places, 0, encoder)
    loss_mask = np.zeros(len(whole.ids), dtype=np.uint8)
    for span in rendered.spans:
        start = encoder.find_border(whole, span.prompt)
        if start is None:
            raise BorderGlued(span.turn)
        stop_at = _find_stop(whole, start, span, encoder)
        if stop_at is None:
            raise RowRefused(
                f"turn {span.turn} (assistant): the tokenizer joins its stop token with other text. Choose another "
                "template",
                code="stop-not-a-token",
            )
        if span.start > len(span.prompt):
            start += sum(whole.span(index)[1] <= span.start for index in range(start, stop_at))
        loss_mask[start : stop_at + 1] = 1
        for context in span.context:
            _unmask(loss_mask, whole, start, stop_at, context)
    return Sample(np.array(whole.ids, dtype=np.uint32), loss_mask)


def label_rendered(rendered: RenderedChat, encodings: Sequence[Encoding], encoder: Encoder) -> tuple[str, list[Sample]]:
    """A row's samples and how they were made.

    Args:
        encodings: of the texts of `rendered.parts`.

    Raises:
        RowRefused: as `label_chat` and `label_reply`.
    """
    try:
        pairs = zip(rendered.parts, encodings, strict=True)
        return rendered.how, [label_chat(part, encoding, encoder) for part, encoding in pairs]
    except BorderGlued:
        return "composed", [label_reply(part, span, encoder) for part in rendered.parts for span in part.spans]


def _unmask(
    loss_mask: npt.NDArray[np.uint8], encoding: Encoding, start: int, stop_at: int, context: tuple[int, int]
) -> None:
    """Untrain the tokens from `start` to before the stop token that have a character in `context`."""
    for index in range(start, stop_at):
        first, last = encoding.span(index)
        if first < context[1] and last > context[0]:
            loss_mask[index] = 0


def _refuse_control_tokens(encoding: Encoding, places: Sequence[Place], shift: int, encoder: Encoder) -> None:
    """Check promise 8 on the ids: no control token within the row's texts, unless data.control_text allows it.

    Args:
        places: of the row's parts in the whole text, sorted by start.
        shift: where the encoded text begins in the whole text.
    """
    if encoder.control_text == "allow":
        return
    starts = [place.start for place in places]
    for index in np.flatnonzero(encoder.is_control[encoding.ids]):
        first, last = (char + shift for char in encoding.span(int(index)))
        near = bisect.bisect_left(starts, last) - 1
        if near >= 0 and places[near].end > first and last > first:
            raise RowRefused(
                "spells a control token in its text, which this tokenizer does not keep as plain text. Remove it "
                "from the text",
                code="control-token-in-text",
            )


def label_reply(rendered: Rendered, span: Span, encoder: Encoder) -> Sample:
    """One reply after its prompt, encoded separately, as at inference.

    Raises:
        RowRefused: the tokenizer encodes a text differently when it is cut there (SentencePiece prepends a space).
    """
    text = rendered.text[len(span.prompt) : span.end]
    prompt, reply = encoder.encode_texts([span.prompt, text])
    if not (prompt.is_exact and reply.is_exact):
        raise RowRefused(REFUSED_INEXACT, code="control-text-inexact")
    _refuse_control_tokens(prompt, rendered.places, 0, encoder)
    _refuse_control_tokens(reply, rendered.places, len(span.prompt), encoder)
    if not encoder.joins(prompt.ids, reply.ids, text):
        raise BorderGlued(span.turn)
    stop_at = len(reply.ids) - 1
    if reply.ids[-1] != encoder.stop_id(span.stop) or reply.span(stop_at)[1] != len(text):
        raise RowRefused(
            f"turn {span.turn} (assistant): the tokenizer joins its stop token with other text. Choose another "
            "template",
            code="stop-not-a-token",
        )
    ids = np.array([*prompt.ids, *reply.ids], dtype=np.uint32)
    first = span.start - len(span.prompt)
    skipped = sum(reply.span(index)[1] <= first for index in range(stop_at)) if first else 0
    mask = np.zeros(len(reply.ids), dtype=np.uint8)
    mask[skipped:] = 1
    for start, end in span.context:
        _unmask(mask, reply, skipped, stop_at, (start - len(span.prompt), end - len(span.prompt)))
    return Sample(ids, np.concatenate([np.zeros(len(prompt.ids), dtype=np.uint8), mask]))


def trains_unknown(samples: Sequence[Sample], encoder: Encoder) -> bool:
    """Whether the unknown token is trained."""
    unknown = encoder.shield.unknown_id
    return unknown is not None and any(
        bool(((sample.input_ids == unknown) & (sample.loss_mask == 1)).any()) for sample in samples
    )


def train_all(sample: Sample) -> Sample:
    """The sample with every token trained, questions included (data.train_on all)."""
    return Sample(sample.input_ids, np.ones_like(sample.loss_mask))


def _find_stop(encoding: Encoding, start: int, span: Span, encoder: Encoder) -> int | None:
    """Index of the stop token at the end of a reply that begins at token `start`."""
    index = encoding.first_from(span.end - len(span.stop))
    is_stop = start <= index < len(encoding.ids) and encoding.ids[index] == encoder.stop_id(span.stop)
    return index if is_stop and encoding.span(index)[1] == span.end else None


def join_completion(conversation: Conversation) -> tuple[str, str]:
    """Prompt and completion of a row for data.chat_template none; a prefill belongs to the prompt."""
    *context, reply = conversation.messages
    if len(context) > 1 or any(m.role != "user" for m in context) or reply.tool_calls or reply.reasoning_content:
        raise RowRefused(
            "data.chat_template none joins one prompt and one completion; this row has more turns. Use a chat template",
            code="needs-template",
        )
    if conversation.tools or conversation.documents or conversation.template_kwargs:
        what = "tools" if conversation.tools else "documents" if conversation.documents else "chat_template_kwargs"
        raise RowRefused(f"data.chat_template none has no place for {what}; use a chat template", code="needs-template")
    prefill = reply.context_spans[0][1] if reply.context_spans else 0
    if len(reply.context_spans) > 1 or (prefill and reply.context_spans[0][0]):
        raise RowRefused(
            "data.chat_template none cannot leave out the middle of a completion; use a chat template",
            code="needs-template",
        )
    return "".join(m.content for m in context) + reply.content[:prefill], reply.content[prefill:]


def label_completion(prompt: Encoding, whole: Encoding, encoder: Encoder) -> Sample:
    """prompt + completion + EOS, with completion and EOS trained.

    Args:
        prompt: encoding of the prompt alone.
        whole: encoding of prompt and completion joined.
    """
    start = len(prompt.ids)
    if list(whole.ids[:start]) != list(prompt.ids):
        raise RowRefused(
            "a token spans the border between prompt and completion; end the prompt with a line break",
            code="border-glued",
        )
    ids = [*encoder.bos_ids, *whole.ids, encoder.stop.id]
    loss_mask = np.ones(len(ids), dtype=np.uint8)
    loss_mask[: len(encoder.bos_ids) + start] = 0
    return Sample(np.array(ids, dtype=np.uint32), loss_mask)


def label_segments(segments: Segments, encodings: Sequence[Encoding], encoder: Encoder) -> Sample:
    """Pieces of a text, encoded separately, each trained or not as the row says; only a missing BOS is added."""
    bos = encoder.bos_ids if list(encodings[0].ids[:1]) != encoder.bos_ids else []
    ids, mask = [*bos], [0] * len(bos)
    for (_, is_trained), encoding in zip(segments.parts, encodings, strict=True):
        ids += encoding.ids
        mask += [int(is_trained)] * len(encoding.ids)
    if not any(mask):
        raise RowRefused("none of its segments is trained", by_choice=True, code="nothing-trained")
    return Sample(np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8))


class TextSamples(Sequence[Sample]):
    """A document's samples: every token trained once, split without loss.

    Each later sample begins with the last token of the one before, as context: its first token is predicted from it.

    Args:
        ids: of the document, with BOS and EOS.
        has_bos: whether the first id is BOS, which is not trained.
    """

    def __init__(self, ids: npt.NDArray[np.uint32] | IdFile, has_bos: bool, max_seq_len: int) -> None:
        self._ids, self._has_bos, self._max_seq_len = ids, has_bos, max_seq_len
        self._starts = range(0, max(1, len(ids) - 1), max_seq_len - 1)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        start = self._starts[index]
        piece = self._ids[start : start + self._max_seq_len]
        loss_mask = np.ones(len(piece), dtype=np.uint8)
        if start or self._has_bos:
            loss_mask[0] = 0
        return Sample(piece, loss_mask)


def text_borders(encoder: Encoder) -> tuple[list[int], list[int]]:
    """BOS and EOS of a document, where the tokenizer has them.

    BOS is added even where the tokenizer adds none to prompts: the first token is predicted from it.
    """
    bos = [encoder.bos_id] if encoder.bos_id is not None else []
    return bos, [encoder.eos_id] if encoder.eos_id is not None else []


def label_text(encoding: Encoding, encoder: Encoder, max_seq_len: int) -> TextSamples:
    """The samples of a document in memory."""
    bos, eos = text_borders(encoder)
    ids = np.concatenate([np.array(part, dtype=np.uint32) for part in (bos, encoding.ids, eos)])
    return TextSamples(ids, bool(bos), max_seq_len)


def label_blocks(
    blocks: Iterable[str], encoder: Encoder, max_seq_len: int, folder: Path | None = None
) -> tuple[TextSamples, tuple[str, ...]]:
    """The samples of a document that is not in memory, and notes about control text in it.

    Args:
        blocks: its text in order.
        folder: for a temporary file of its ids.

    Raises:
        RowRefused: as `prepare_text`, or the text has a lone surrogate.
    """
    notes: dict[str, None] = {}

    def encode_ids(texts: Sequence[str]) -> list[list[int]]:
        prepared = [prepare_text(text, encoder.shield, encoder.control_text) for text in texts]
        notes.update(dict.fromkeys(note for _, found in prepared for note in found))
        if not any(found for _, found in prepared):
            return encoder.encode_ids(texts)
        encodings = encoder.encode_texts([text for text, _ in prepared])
        if not all(encoding.is_exact for encoding in encodings):
            raise RowRefused(REFUSED_INEXACT, code="control-text-inexact")
        return [list(encoding.ids) for encoding in encodings]

    bos, eos = text_borders(encoder)
    ids = IdFile(folder)
    ids.extend(bos)
    encode_blocks(blocks, encode_ids, ids)
    ids.extend(eos)
    return TextSamples(ids, bool(bos), max_seq_len), tuple(notes)
