"""Encode texts in Latin, Greek and Cyrillic letters from a cache of words.

Byte-level BPE (GPT-2, Qwen, Llama 3, MiniMind) cuts a text into words with a regular expression and encodes each word
for itself. The tokenizer spends most of its time on the cutting. Here Python's `re` cuts, and the tokenizer's model
encodes each distinct word once, so that English text takes a third of the time.

The ids are the tokenizer's own. Only texts are encoded here for which that can be shown: of characters that
normalization leaves as they are and of which both regular expression engines think the same, without the spelling of an
added token. Tokenizers of another kind have no such encoder, nor has one whose own ids differ for any of the probes,
which have each of these characters in several places and all pairs of ASCII characters.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
_MAX_WORDS = 1 << 17  # in the cache, which starts anew when it is full
_MAX_CHARACTERS = 1 << 22
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel cuts with
_SAME_ON_ASCII, _SAME_ON_BOTH = {None, "NFC", "NFD", "NFKC", "NFKD"}, {None, "NFC"}  # normalizers
_TOKEN = re.compile(
    r"""
    \\p\{(?P<kind>L[ultmo]?|N|M)\} | \\[sSrnt] | \(\?(?: : | i: | ! | = ) | [()|?*+\[\]^-]
    | \{\d*,?\d*\}(?![+?]) | [ '"A-Za-z0-9/_,;:<>]
    """,
    re.VERBOSE,
)
_DOUBLE_S = re.compile(r"[sS][^A-Za-z|']*[sS]|[sS]\)*[{+*]")
_ESCAPED = re.compile(r"\\(?:p\{\w+\}|.)")
_ASCII = "".join(map(chr, range(128)))
# Latin, Greek, Cyrillic, punctuation, currencies, letterlike signs, arrows, mathematics, boxes and symbols
_WIDE_RANGES = ((0x80, 0x17F), (0x386, 0x3CF), (0x400, 0x460), (0x2010, 0x2060), (0x20A0, 0x20BA), (0x2116, 0x2123),
                (0x2190, 0x2300), (0x2500, 0x2700))  # fmt: skip
_SELF_WRITTEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_WRITTEN = {byte: 256 + place for place, byte in enumerate(b for b in range(256) if b not in _SELF_WRITTEN)}
"""Bytes that byte-level BPE writes as another character; other bytes are written as the character of their number."""

_agreed: dict[bytes, bool] = {}
"""Tokenizer and characters, as a hash -> whether the ids of the probes were the tokenizer's, in this process."""


class WordEncoder:
    """Ids of texts, equal to the tokenizer's.

    Args:
        backend: a `tokenizers.Tokenizer` that does not truncate.
        patterns: by which its texts are cut, one after the other.
        characters: of which texts may consist.
    """

    def __init__(self, backend: Any, patterns: Sequence[re.Pattern[str]], characters: str) -> None:
        self._other = re.compile(f"[^{_as_class(characters)}]")
        added = _added_texts(backend)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._starts = frozenset(text[:2] for text in added)
        *earlier, last = patterns
        self._earlier, self._cut = earlier, last.findall
        self._words = _Words(backend.model.tokenize)

    @classmethod
    def of(cls, backend: Any) -> WordEncoder | None:
        """The encoder for a tokenizer; None where its ids could be others."""
        normalizer = _settings(backend.normalizer).get("type", "?") if backend.normalizer is not None else None
        for characters in (_ASCII + _wide_characters(), _ASCII) if normalizer in _SAME_ON_BOTH else (_ASCII,):
            patterns = _read_patterns(backend, characters) if normalizer in _SAME_ON_ASCII else None
            if patterns is None:
                return None
            encoder = cls(backend, patterns, characters)
            key = sha256(repr((backend.to_str(), [p.pattern for p in patterns], characters)).encode()).digest()
            if key not in _agreed:  # a tokenizer that has encoded the probes leaves some MB in the library for ever
                _agreed[key] = encoder._agrees_with(backend, _probes(characters))
            if _agreed[key]:
                return encoder
        return None

    def _agrees_with(self, backend: Any, texts: Sequence[str]) -> bool:
        texts = [text for text in texts if self.takes(text)]
        try:
            others = backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # the library has no class for it: a probe with bytes that the vocabulary lacks
            return False
        return all(own.tolist() == other.ids for own, other in zip(self.encode(texts), others, strict=True))

    def takes(self, text: str) -> bool:
        """Whether a text may be encoded here."""
        if not text.isascii() and self._other.search(text):
            return False
        if self._added is not None:
            for start in self._starts:
                if start in text:
                    return self._added.search(text) is None
        return True

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts, all of which `takes` is true for."""
        words = self._words = self._words.trimmed()
        cut: list[str] = []
        ends: list[int] = []
        for text in texts:
            if self._earlier:
                for piece in self._pieces(text):
                    cut += self._cut(piece)
            else:
                cut += self._cut(text)
            ends.append(len(cut))
        numbers = np.fromiter(map(words.__getitem__, cut), np.int64, len(cut))
        ids, places = words.join(numbers)
        starts = places[[0, *ends[:-1]]].tolist() if ends else []
        stops = places[ends].tolist() if ends else []
        return [ids[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def _pieces(self, text: str) -> list[str]:
        """A text cut by all patterns but the last; what lies between two matches is a piece too."""
        pieces = [text]
        for pattern in self._earlier:
            pieces = [part for piece in pieces for part in _split(pattern, piece)]
        return pieces


class _Words(dict[str, int]):
    """Numbers of words, whose ids are in arrays."""

    def __init__(self, tokenize: Callable[[str], Any]) -> None:
        super().__init__()
        self._tokenize = tokenize
        self._ids, self._ends, self._characters = array("I"), array("q", [0]), 0
        self._arrays: tuple[Ids, npt.NDArray[np.int64]] | None = None

    def __missing__(self, word: str) -> int:
        self._ids.extend([token.id for token in self._tokenize(word.encode().decode("latin-1").translate(_WRITTEN))])
        self._ends.append(len(self._ids))
        self._characters += len(word)
        self._arrays = None
        number = self[word] = len(self)
        return number

    def trimmed(self) -> _Words:
        """This cache, empty if it was full."""
        if len(self) > _MAX_WORDS or self._characters > _MAX_CHARACTERS:
            return _Words(self._tokenize)
        return self

    def join(self, numbers: npt.NDArray[np.int64]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Ids of words one after another, and the place where each word begins, with the end of the last."""
        if self._arrays is None:  # copies: an array that numpy looks into cannot grow
            self._arrays = np.array(self._ids, np.uint32), np.array(self._ends, np.int64)
        ids, ends = self._arrays
        starts = ends[numbers]
        lengths = ends[numbers + 1] - starts
        places = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ids[np.repeat(starts - places[:-1], lengths) + np.arange(places[-1])], places


def _split(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    at = 0
    for match in pattern.finditer(text):
        if match.start() > at:
            yield text[at : match.start()]
        if match.end() > match.start():
            yield match[0]
        at = match.end()
    if at < len(text):
        yield text[at:]


@lru_cache(maxsize=1)
def _wide_characters() -> str:
    """Characters besides ASCII that normalization to NFC does not change, whatever stands beside them."""
    return "".join(
        char
        for first, last in _WIDE_RANGES
        for char in map(chr, range(first, last))
        if unicodedata.category(char)[0] not in "MC" and unicodedata.normalize("NFC", char) == char
    )


def _as_class(characters: str) -> str:
    """Inside of a character class."""
    places = sorted(map(ord, characters))
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in runs)


def _read_patterns(backend: Any, characters: str) -> list[re.Pattern[str]] | None:
    """What a byte-level BPE cuts its texts with; None for a tokenizer that is not known to do only that."""
    from tokenizers import models

    model, cutter = backend.model, backend.pre_tokenizer
    if not isinstance(model, models.BPE) or model.dropout is not None or cutter is None:
        return None
    settings = _settings(cutter)
    parts = settings["pretokenizers"] if settings.get("type") == "Sequence" else [settings]
    *splits, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    written: list[str] = []
    for split in splits:
        if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
            return None
        written.append(split["pattern"].get("Regex", "("))
    found = [
        _translate(pattern, characters) for pattern in (*written, *([_GPT2] if last.get("use_regex", True) else []))
    ]
    patterns = [pattern for pattern in found if pattern is not None]
    return patterns if patterns and len(patterns) == len(found) else None


def _added_texts(backend: Any) -> list[str]:
    """Spellings of the added tokens, also as normalization writes them: a normalized text is searched for these."""
    texts = [token.content for token in backend.get_added_tokens_decoder().values()]
    if backend.normalizer is not None:
        texts += [backend.normalizer.normalize_str(text) for text in texts]
    return list(dict.fromkeys(texts))


def _settings(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as it is in tokenizer.json; empty where it is written in Python, which has no such form."""
    try:
        found = json.loads(part.__getstate__())
    except Exception:  # the library has no class for it
        return {}
    return found if isinstance(found, dict) else {}


def _translate(pattern: str, characters: str) -> re.Pattern[str] | None:
    """A pattern for texts of these characters; None if it has more than is known to mean the same in both engines."""
    if "(?i:" in pattern and "\xdf" in characters and _DOUBLE_S.search(_ESCAPED.sub("|", pattern)):
        return None  # the other engine takes it for ss
    kinds = {char: unicodedata.category(char) for char in characters}
    written, at, is_class = "", 0, False
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return None
        text = token[0]
        if kind := token["kind"]:
            text = _as_class("".join(char for char, own in kinds.items() if own.startswith(kind)))
        elif text in (r"\s", r"\S"):
            text = _as_class("".join(char for char, own in kinds.items() if own[0] == "Z" or char in "\t\n\v\f\r\x85"))
        if token["kind"] or token[0] == r"\s":
            text = text if is_class else f"[{text}]"  # an empty one does not compile
        elif token[0] == r"\S":
            if is_class:
                return None
            text = f"[^{text}]"
        elif text == "(":  # a group that captures
            return None
        elif text in "[]":
            if is_class == (text == "["):
                return None
            is_class = not is_class
        written += text
        at = token.end()
    try:
        return re.compile(written, re.ASCII)
    except re.error:
        return None


def _probes(characters: str) -> list[str]:
    """Texts with each character in several places, every pair of ASCII characters, and many of those that patterns
    distinguish."""
    pairs = "".join(itertools.chain.from_iterable(itertools.product(_ASCII, repeat=2)))
    telling = ["'s", "'S", "'LL", "'ve", *"aZ09  \n\r\t\v\x1c\x7f!'_/", *"é²…\xa0"[: 4 if len(characters) > 128 else 0]]
    rng = random.Random(0)
    texts = ["".join(rng.choices(telling, k=rng.randint(1, 12))) for _ in range(1500)]
    texts += [f"{c}a{c}1{c} {c}!{c}{c}'{c}\n{c}'s{c}A {c} " for c in characters]
    return [*(pairs[start : start + 512] for start in range(0, len(pairs), 512)), *characters, *texts]
