"""Encode long texts in pieces, so that memory stays a small multiple of the text.

A tokenizer's result takes about 300 bytes per token, of which training needs 12. A long text is cut only where the cut
changes nothing: the text around each cut is encoded whole and in two parts, and the ids must be equal.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 1 << 18  # characters
_AROUND = 512  # characters on each side of a cut that are encoded together and separately
_TRIES = 32
_NUM_TOGETHER = min(4, os.cpu_count() or 1)  # pieces that are encoded at once, each on a core


class LongIds:
    """Ids and character spans of a long text, in arrays.

    Attributes:
        ids: one per token.
        starts, ends: the characters [start, end) of each token.
    """

    def __init__(self) -> None:
        self.ids, self.starts, self.ends = array("I"), array("I"), array("I")

    def extend(self, encoding: Any, shift: int) -> None:
        spans = np.array(encoding.offsets, dtype=np.uint32).reshape(-1, 2) + np.uint32(shift)
        self.ids.extend(encoding.ids)
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


def encode_long(backend: Any, text: str) -> LongIds | None:
    """Encode a long text in pieces; None if some cut cannot be shown to change nothing.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """
    found = LongIds()
    start = 0
    cuts = _find_cuts(backend, text)
    while group := list(itertools.islice(cuts, _NUM_TOGETHER)):
        ends = [cut for cut in group if cut is not None]
        if len(ends) < len(group):
            return None
        starts = [start, *ends[:-1]]
        pieces = [text[a:b] for a, b in zip(starts, ends, strict=True)]
        for shift, encoding in zip(starts, backend.encode_batch(pieces, add_special_tokens=False), strict=True):
            found.extend(encoding, shift)
        start = ends[-1]
    return found


def _find_cuts(backend: Any, text: str) -> Iterator[int | None]:
    """Ends of the pieces; yields None and stops where no cut can be found."""
    end = 0
    while end < len(text):
        wanted = end + PIECE
        if wanted >= len(text):
            yield len(text)
            return
        tries = (cut for cut in _places(text, wanted, wanted + PIECE) if _changes_nothing(backend, text, cut))
        cut = next(tries, None)
        yield cut
        if cut is None:
            return
        end = cut


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


def _changes_nothing(backend: Any, text: str, cut: int) -> bool:
    before, behind = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    together, one, other = backend.encode_batch([before + behind, before, behind], add_special_tokens=False)
    return bool(together.ids == one.ids + other.ids)
