"""Fit samples to max_seq_len: truncate, split, drop or refuse, and count what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.data.labels import Sample
from tunesmith.errors import DataError
from tunesmith.rows.conversation import RowRefused

_MAX_THOUGHTS = 512  # tokens

NOTE_CUT_REPLY = "its last reply is cut before the stop token"
NOTE_TURN_LOST = "one of its turns is beyond data.max_seq_len and is left out"
NOTE_PIECE_LOST = "a piece of it without trained tokens is left out"


@dataclass(frozen=True, slots=True)
class Fitted:
    """The samples of a row after fitting.

    Attributes:
        tokens_lost: tokens of the row that are in no sample; tokens shared by several samples count once.
        reason: "truncated", "split" or "".
        num_cut: replies that end before their stop token.
    """

    samples: tuple[Sample, ...]
    tokens_lost: int = 0
    reason: str = ""
    notes: tuple[str, ...] = ()
    num_cut: int = 0


def fit_samples(samples: Sequence[Sample], overlong: str, max_seq_len: int, where: str) -> Fitted:
    """Fit samples to max_seq_len.

    Args:
        overlong: data.overlong: truncate, drop, split or error.
        where: FILE:ROW, for the error.

    Raises:
        RowRefused: no trained token would be left, or data.overlong is drop.
        DataError: data.overlong is error.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    if longest <= max_seq_len:
        return Fitted(tuple(samples))
    if overlong == "error":
        raise DataError(
            f"{where}: is {longest} tokens long and data.max_seq_len is {max_seq_len} (data.overlong error). Raise "
            "data.max_seq_len, or choose --data.overlong truncate, drop or split.",
            code="row-too-long",
        )
    if overlong == "drop":
        raise RowRefused(
            f"is {longest} tokens long and data.max_seq_len is {max_seq_len} (data.overlong drop)",
            by_choice=True,
            code="row-too-long",
        )
    kept, lost, notes = [], 0, Counter[str]()
    for sample, own_from in zip(samples, _own_starts(samples), strict=True):
        places = _places(sample, max_seq_len) if overlong == "split" else [slice(0, max_seq_len)]
        pieces = [_piece(sample, place) for place in places]
        trained = [piece for piece in pieces if piece.num_targets]
        if len(trained) < len(pieces):
            notes[NOTE_PIECE_LOST if overlong == "split" else NOTE_TURN_LOST] += 1
        if overlong == "truncate" and trained and _cuts_reply(sample, max_seq_len):
            notes[NOTE_CUT_REPLY] += 1
        is_held = np.zeros(len(sample.input_ids), dtype=bool)
        for place, piece in zip(places, pieces, strict=True):
            is_held[place] |= bool(piece.num_targets)
        kept += trained
        lost += int((~is_held[own_from:]).sum())
    if not kept:
        raise RowRefused(
            f"is {longest} tokens long, and all trained tokens are beyond data.max_seq_len {max_seq_len}. Raise it, "
            "or choose --data.overlong split",
            code="targets-beyond-length",
        )
    reason = "split" if overlong == "split" else "truncated"
    return Fitted(tuple(kept), lost, reason, tuple(notes), notes[NOTE_CUT_REPLY])


def _own_starts(samples: Sequence[Sample]) -> Iterator[int]:
    """Where each sample's own tokens begin: unrolled samples of one chat share their first turns."""
    before = np.empty(0, dtype=np.uint32)
    for sample in samples:
        length = min(len(before), len(sample.input_ids))
        differs = before[:length] != sample.input_ids[:length]
        same = int(differs.argmax()) if differs.any() else length
        yield same + _repeated(before[same:], sample.input_ids[same:])
        before = sample.input_ids


def _repeated(reply: npt.NDArray[np.uint32], following: npt.NDArray[np.uint32]) -> int:
    """Tokens of the previous reply that appear in this sample as history, without its leading reasoning."""
    for thoughts in range(min(_MAX_THOUGHTS, len(reply))):
        said = reply[thoughts:]
        if np.array_equal(said, following[: len(said)]):
            return len(said)
    return 0


def _cuts_reply(sample: Sample, max_seq_len: int) -> bool:
    """Whether the cut is inside a reply: both neighbours are trained, and a run of 1s ends with the stop token."""
    return len(sample.input_ids) > max_seq_len and bool(
        sample.loss_mask[max_seq_len - 1] and sample.loss_mask[max_seq_len]
    )


def _places(sample: Sample, max_seq_len: int) -> list[slice]:
    """Consecutive pieces; each later one starts with the last token of the piece before, as context."""
    starts = range(0, max(1, len(sample.input_ids) - 1), max_seq_len - 1)
    return [slice(start, start + max_seq_len) for start in starts]


def _piece(sample: Sample, place: slice) -> Sample:
    mask = sample.loss_mask[place].copy()
    if place.start:
        mask[0] = 0
    return Sample(sample.input_ids[place], mask)
