"""Byte-fallback BPE (Llama 2, Gemma) as llama.cpp computes it, which knows scores of tokens and no merges.

llama.cpp joins the two neighbours whose joined text is the token of the highest score, the leftmost among equals; the
scores are made of the ranks of the merges. The ids are the same where each token is the result of merges of
neighbouring ranks, as in tokenizers converted from SentencePiece.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"
_UNRANKED = -1e9  # a token that no merge makes


@dataclass(frozen=True, slots=True)
class SpmVocabulary:
    """Tokens and scores.

    Attributes:
        scores: by id.
        has_prefix: whether a space is put before a text.
    """

    ids: Mapping[str, int]
    scores: Sequence[float]
    has_prefix: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        if not text:
            return []
        text = (" " + text if self.has_prefix else text).replace(" ", SPACE)
        pieces: list[str] = list(text)
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        queue: list[tuple[float, int, str]] = []

        def push(left: int) -> None:
            if (
                left >= 0
                and (right := after[left]) >= 0
                and (token := self.ids.get(joined := pieces[left] + pieces[right])) is not None
            ):
                heapq.heappush(queue, (-self.scores[token], left, joined))

        for place in range(len(text)):
            push(place)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = after[left]
            if not pieces[left] or right < 0 or pieces[left] + pieces[right] != joined:
                continue
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            push(before[left])
            push(left)
        found: list[int] = []
        for piece in filter(None, pieces):
            token = self.ids.get(piece)
            found += [token] if token is not None else [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return found


def read_spm(settings: Mapping[str, Any]) -> SpmVocabulary | None:
    """The vocabulary of a tokenizer.json; None if it is not byte-fallback BPE of this kind."""
    model = settings["model"]
    prefix = _prefix(settings.get("normalizer"), settings.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not model.get("byte_fallback") or prefix is None:
        return None
    ids: dict[str, int] = dict(model["vocab"])
    if any(f"<0x{byte:02X}>" not in ids for byte in range(256)):
        return None
    scores = [_UNRANKED] * (max(ids.values()) + 1)
    for rank, merge in enumerate(model["merges"]):
        joined = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if joined in ids and scores[ids[joined]] == _UNRANKED:
            scores[ids[joined]] = -float(rank)
    return SpmVocabulary(ids, scores, prefix)


def _prefix(normalizer: Any, pre_tokenizer: Any) -> bool | None:
    """Whether a space comes before a text; None if spaces are not replaced, or the text is changed otherwise."""
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [part["type"] for part in parts]
    if kinds in (["Prepend", "Replace"], ["Replace"]):
        replaced = parts[-1]
        if replaced["pattern"] != {"String": " "} or replaced["content"] != SPACE:
            return None
        if kinds[0] == "Prepend" and parts[0]["prepend"] != SPACE:
            return None
        # Gemma's pre-tokenizer splits at spaces, of which none is left
        is_plain = pre_tokenizer is None or (
            pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "}
        )
        return kinds[0] == "Prepend" if is_plain else None
    if not kinds and pre_tokenizer and pre_tokenizer["type"] == "Metaspace" and not pre_tokenizer.get("split", True):
        return bool(pre_tokenizer["prepend_scheme"] != "never")
    return None
