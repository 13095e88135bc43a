"""Encode long texts in pieces, so that memory stays bounded.

A tokenizer's result takes about 300 bytes per token, of which training needs 12. A long text is cut only where the cut
changes nothing: the text around each cut is encoded whole and in two parts, and the ids must be equal.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE = 1 << 18  # characters
_AROUND = 512  # characters on each side of a cut that are encoded together and separately
_TRIES = 32
_STARTS = 4
_NUM_TOGETHER = min(4, os.cpu_count() or 1)  # pieces that are encoded at once, each on a core
_IN_MEMORY = 1 << 25  # bytes of ids; more are in a temporary file

EncodeIds = Callable[[Sequence[str]], Sequence[list[int]]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text to encode.

    Attributes:
        start: where `text` begins in the whole text.
        context_ids: ids at its beginning that belong to the piece before. Tokenizers that mark the beginning of a text
            (SentencePiece) encode the rest as within the whole text only after such a context.
    """

    text: str
    start: int
    context_ids: tuple[int, ...] = ()


class LongIds:
    """Ids and character spans of a long text, in arrays.

    Attributes:
        ids: one per token.
        starts, ends: the characters [start, end) of each token.
    """

    def __init__(self) -> None:
        self.ids, self.starts, self.ends = array("I"), array("I"), array("I")

    def extend(self, encoding: Any, piece: Piece) -> None:
        skipped = len(piece.context_ids)
        spans = np.array(encoding.offsets[skipped:], dtype=np.uint32).reshape(-1, 2) + np.uint32(piece.start)
        self.ids.extend(encoding.ids[skipped:])
        self.starts.frombytes(np.ascontiguousarray(spans[:, 0]).tobytes())
        self.ends.frombytes(np.ascontiguousarray(spans[:, 1]).tobytes())

    def token_to_chars(self, index: int) -> tuple[int, int]:
        return self.starts[index], self.ends[index]

    def char_to_token(self, char: int) -> int:
        """The first token that begins at a character or after it."""
        return int(np.searchsorted(np.frombuffer(self.starts, dtype=np.uint32), char))

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.ends, strict=True))


class IdFile:
    """Ids of a document: in memory, or in a temporary file where they are many.

    Args:
        folder: of the temporary file; by default the system's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder) if folder else None)  # noqa: SIM115 - closed with the object
        self._length = 0

    def extend(self, ids: Sequence[int]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(np.array(ids, dtype=np.uint32).tobytes())
        self._length += len(ids)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> npt.NDArray[np.uint32]:
        start, stop, _ = place.indices(self._length)
        self._file.seek(4 * start)
        return np.frombuffer(self._file.read(4 * (stop - start)), dtype=np.uint32)


def encode_long(backend: Any, text: str) -> LongIds:
    """Encode a long text in pieces.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """

    def encode_ids(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]

    found = LongIds()
    pieces = cut_pieces((text[start : start + PIECE] for start in range(0, len(text), PIECE)), encode_ids)
    while group := list(itertools.islice(pieces, _NUM_TOGETHER)):
        encodings = backend.encode_batch([piece.text for piece in group], add_special_tokens=False)
        for piece, encoding in zip(group, encodings, strict=True):
            found.extend(encoding, piece)
    return found


def encode_blocks(blocks: Iterable[str], encode_ids: EncodeIds, into: IdFile) -> None:
    """Encode a text that is not in memory.

    Args:
        blocks: the text in order.
        encode_ids: gives the ids of texts.
    """
    pieces = cut_pieces(blocks, encode_ids)
    while group := list(itertools.islice(pieces, _NUM_TOGETHER)):
        for piece, ids in zip(group, encode_ids([piece.text for piece in group]), strict=True):
            into.extend(ids[len(piece.context_ids) :])


def cut_pieces(blocks: Iterable[str], encode_ids: EncodeIds) -> Iterator[Piece]:
    """Cut a text into pieces that encode to the ids of the whole; one piece where no cut can be shown to keep them."""
    waiting = iter(blocks)
    text, start, context = "", 0, 0  # `text` begins with the context of the next piece
    context_ids: tuple[int, ...] = ()
    tried = PIECE
    while True:
        while len(text) < context + tried + PIECE + _AROUND and (block := next(waiting, "")):
            text += block
        first = context + tried
        if first >= len(text):
            if context < len(text):
                yield Piece(text, start, context_ids)
            return
        for cut in _places(text, first, first + PIECE):
            found = _find_context(text, cut, encode_ids)
            if found is not None:
                yield Piece(text[:cut], start, context_ids)
                context, context_ids = len(found[0]), tuple(found[1])
                start += cut - context
                text, tried = text[cut - context :], PIECE
                break
        else:
            tried += PIECE


def _places(text: str, start: int, end: int) -> Iterator[int]:
    """A few positions after a line break or before a space, where cutting is least likely to split a word."""
    for mark, shift in (("\n", 1), (" ", 0), ("。", 1), ("<", 0)):
        at = start
        for _ in range(_TRIES):
            at = text.find(mark, at, end)
            if at < 0:
                break
            yield at + shift
            at += 1


def _find_context(text: str, cut: int, encode_ids: EncodeIds) -> tuple[str, list[int]] | None:
    """The context behind which the text after a cut encodes as in the whole text, and its ids; None if none does.

    The text before the cut is taken from several starts: within a long run of repeated characters, how the tokens
    divide the run depends on where it begins, which may be out of sight.
    """
    before, behind = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    if not behind or before[-1] == behind[0] or (before[-1].isspace() and behind[0].isspace()):
        return None
    starts = [before[number:] for number in range(_STARTS)]
    behind_alone, context, with_context, *others = encode_ids(
        [behind, before[-1], before[-1] + behind, *starts, *(start + behind for start in starts)]
    )
    pairs = list(zip(others[:_STARTS], others[_STARTS:], strict=True))
    if all(together == alone + behind_alone for alone, together in pairs):
        return "", []
    after = with_context[len(context) :]
    if with_context[: len(context)] == context and all(together == alone + after for alone, together in pairs):
        return before[-1], context
    return None
