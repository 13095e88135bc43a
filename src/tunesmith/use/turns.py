"""Which tokens of a labelled row belong to whose turn: for showing a row, not for training it.

The row is rendered once more, with the places of its parts (chat_template/trace.py). Only where that gives the very ids
of a sample are its turns known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tunesmith.chat_template.habits import TemplateRefused, find_empty_think
from tunesmith.chat_template.trace import Place
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.draws import add_system_prompt
from tunesmith.encode.empty_think import find_unreasoned, remove_empty_think
from tunesmith.encode.encoder import Encoder, Encoding
from tunesmith.encode.messages import prepare_messages
from tunesmith.encode.render import RenderedChat, render_chat
from tunesmith.rows.conversation import Conversation, Message, RowRefused

_TOOL_KINDS = ("tool_name", "tool_description")


@dataclass(frozen=True, slots=True)
class Turn:
    """Consecutive tokens [start, end) of a sample.

    Attributes:
        role: whose turn they write: system, user, assistant, tool; tools or documents; "" where it is not known.
    """

    role: str
    start: int
    end: int


_Role = tuple[str, int | None, int]


@dataclass(frozen=True, slots=True)
class _Text:
    """A text of the row with its tokens and the roles of its characters: (role, start, end), sorted.

    A turn without text has start None: it is somewhere between its neighbours.
    """

    ids: npt.NDArray[np.uint32]
    spans: list[tuple[int, int]]
    roles: list[_Role]


def find_turns(row: LabelledRow, encoder: Encoder, data: DataSection) -> list[list[Turn]]:
    """The turns of each sample of a row, in order and without gaps; one without a role where they are not known."""
    texts: Sequence[_Text] = ()
    if isinstance(row.source, Conversation) and row.how in ("as_rendered", "unrolled", "composed"):
        texts = list(_texts_of(add_system_prompt(row.source, row.system_prompt), row.loses_think, encoder, data))
    elif row.how == "joined":
        return [_by_mask(sample) for sample in row.samples]
    found = [_turns_of(sample, texts, encoder, _piece_length(row)) for sample in row.samples]
    if data.train_on == "all":
        return found
    return [_begin_replies(turns, sample) for turns, sample in zip(found, row.samples, strict=True)]


def _begin_replies(turns: Sequence[Turn], sample: Sample) -> list[Turn]:
    """The turns, with trained tokens before a reply moved into it: a template may write <think> there, for example."""
    moved = list(turns)
    for at in range(1, len(moved)):
        before, reply = moved[at - 1], moved[at]
        border = before.end
        while reply.role == "assistant" != before.role and border > before.start and sample.loss_mask[border - 1]:
            border -= 1
        moved[at - 1], moved[at] = replace(before, end=border), replace(reply, start=border)
    return [turn for turn in moved if turn.end > turn.start]


def _by_mask(sample: Sample) -> list[Turn]:
    """A prompt and its completion."""
    border = int(sample.loss_mask.argmax()) if sample.loss_mask.any() else len(sample.loss_mask)
    both = [Turn("user", 0, border), Turn("assistant", border, len(sample.loss_mask))]
    return [turn for turn in both if turn.end > turn.start]


def _piece_length(row: LabelledRow) -> int:
    """Tokens of a piece of a row that was split; longer than any text otherwise."""
    lengths = [len(sample.input_ids) for sample in row.samples]
    return max(lengths) if row.reason == "split" else max(lengths) + row.tokens_lost + 2


def _turns_of(sample: Sample, texts: Sequence[_Text], encoder: Encoder, piece: int) -> list[Turn]:
    count = len(sample.input_ids)
    for text in texts:
        for start in range(0, max(1, len(text.ids) - 1), max(1, piece - 1)):
            if np.array_equal(text.ids[start : start + count], sample.input_ids):
                found = _split_tokens(text, encoder)
                cut = [Turn(t.role, max(t.start - start, 0), min(t.end - start, count)) for t in found]
                return [turn for turn in cut if turn.end > turn.start]
    return [Turn("", 0, count)]


def _texts_of(source: Conversation, loses_think: bool, encoder: Encoder, data: DataSection) -> Iterator[_Text]:
    """Every text that a sample of the row may have been made of: renderings, and replies behind their prompts."""
    renderer = encoder.renderer()
    if renderer is None:
        return
    history = "last_turn" if data.train_on == "last_assistant" else data.history
    try:
        chat = prepare_messages(source, renderer.habits, encoder.shield, encoder.control_text)
        rendered = render_chat(chat, renderer, encoder.stops, history, data.train_reasoning)
        if loses_think and (empty := find_empty_think(renderer)):
            rendered = remove_empty_think(rendered, empty, find_unreasoned(source.messages, chat.messages), history)
    except (RowRefused, TemplateRefused):
        return
    for part, encoding in zip(rendered.parts, _encode(rendered, encoder), strict=True):
        yield _Text(_ids(encoding), list(encoding.offsets), _roles_of(part.places, chat.messages))
    if rendered.how != "as_rendered" or len(rendered.parts) == 1:
        for part in rendered.parts:
            for span in part.spans:
                border = len(span.prompt)
                prompt, reply = encoder.encode_texts([span.prompt, part.text[border : span.end]])
                spans = [*prompt.offsets, *((start + border, end + border) for start, end in reply.offsets)]
                ids = np.concatenate([_ids(prompt), _ids(reply)])
                yield _Text(ids, spans, _roles_of(part.places, chat.messages))


def _encode(rendered: RenderedChat, encoder: Encoder) -> list[Encoding]:
    return encoder.encode_texts([part.text for part in rendered.parts])


def _ids(encoding: Encoding) -> npt.NDArray[np.uint32]:
    return np.array(encoding.ids, dtype=np.uint32)


def _roles_of(places: Sequence[Place], messages: Sequence[Message]) -> list[_Role]:
    """Stretches of one role, from its first part to its last; what the row says once may stand inside another part."""
    found: list[_Role] = []
    turns: list[int] = []
    for place in sorted(places, key=lambda place: (place.start, -place.end)):
        turn = place.part.turn
        role = messages[turn].role if turn >= 0 else "tools" if place.part.kind in _TOOL_KINDS else "documents"
        if found and place.end <= found[-1][2]:
            continue
        if found and turns[-1] == turn and found[-1][0] == role:
            found[-1] = (role, found[-1][1], place.end)
        else:
            before = range(max(turns, default=-1) + 1, turn)
            found += [(messages[t].role, None, place.start) for t in before if not messages[t].content.strip()]
            found.append((role, place.start, place.end))
            turns.append(turn)
    return found


def _split_tokens(text: _Text, encoder: Encoder) -> list[Turn]:
    """The whole text as turns. What the template writes between two parts goes to the first up to its closing token."""
    if not text.roles:
        return [Turn("", 0, len(text.ids))]
    turns, begin = [], 0
    for index, (role, start, end) in enumerate(text.roles):
        if index + 1 == len(text.roles):
            turns.append(Turn(role, begin, len(text.ids)))
            break
        until = text.roles[index + 1][1]
        if start is None:
            border = _find_end_of_empty(text, begin, role, end, encoder)
        else:
            border = _find_border(text, end, text.roles[index + 1][2] if until is None else until, encoder)
        if border > begin:
            turns.append(Turn(role, begin, border))
            begin = border
    return turns


def _find_end_of_empty(text: _Text, begin: int, role: str, until: int, encoder: Encoder) -> int:
    """Index of the first token behind a turn without text, at `begin` where the template does not write the turn.

    A user's turn without a stop token, as in [INST]  [/INST], takes all up to the text that follows.
    """
    ahead = [i for i, (_, stop) in enumerate(text.spans) if i >= begin and stop <= until]
    stop = next((i for i in ahead if text.ids[i] in encoder.stop_ids), None)
    if stop is None:
        return ahead[-1] + 1 if ahead and role == "user" else begin
    return _skip_blank(text, stop + 1, ahead, encoder)


def _skip_blank(text: _Text, border: int, between: Sequence[int], encoder: Encoder) -> int:
    """The border behind tokens of blank text: a line feed behind a stop token ends the turn too."""
    while border in between and not encoder.tokenizer.decode([int(text.ids[border])]).strip():
        border += 1
    return border


def _find_border(text: _Text, end: int, until: int, encoder: Encoder) -> int:
    """Index of the first token of the next turn, among those with characters in [end, until)."""
    between = [i for i, (start, stop) in enumerate(text.spans) if start >= end and stop <= until and stop > start]
    if not between:
        return next((i for i, (start, _) in enumerate(text.spans) if start >= until), len(text.ids))
    stops = (i for i in between if text.ids[i] in encoder.stop_ids)
    closing = next(stops, next((i for i in between if encoder.is_control[text.ids[i]]), None))
    return _skip_blank(text, between[0] if closing is None else closing + 1, between, encoder)
