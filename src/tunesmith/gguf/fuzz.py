"""Texts on which tokenizers disagree: contractions, digits, white space, every Unicode category, emoji sequences."""

from __future__ import annotations

import random
import sys
import unicodedata
from functools import lru_cache

_WORDS = (
    "Hello world a B naïve straße ŁÓDŹ привет Ωμέγα iPhone camelCase XMLHttp snake_case don I we can't e.g. 3rd x2y "
    "你好 世界 こんにちは カタカナ 한국어 नमस्ते ภาษาไทย مرحبا שלום 中文abc ａｂｃ ǅ ﬁn ı İ ß \u212a ſ"
)
_NUMBERS = "0 7 42 123 1234 31415926 1,000.50 ٣ ٠١٢ ２０２６ ½ ²³ Ⅷ ① 三 〇 १२ 𝟙 ㉈"
_MARKS = (
    '! ? . ... , ; : / // \\ ( ) [] {} <| |> </ _ __ - -- = += # ## $ % & * ** @ ^ ` ``` ~ | " “ ” ， 。 、 ！ ？ ： '
    "《 》 （ ） € ¥ ° § × → ∑ — … ·"
)
_ENDINGS = ("s", "S", "t", "T", "re", "RE", "rE", "ve", "VE", "m", "M", "ll", "LL", "lL", "d", "D", "ſ", "x", "")
_CONTRACTIONS = tuple(mark + ending for mark in "'’" for ending in _ENDINGS)
_SPACES = (
    *(" ", " ", " ", "  ", "   ", "    ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", "  \n  "),
    *("\t", "\t\t", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", "\u1680"),
    *("\u200b", "\u180e", "\ufeff", "\x1c", "\x1f"),
)
_EMOJI = (
    *("😀", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪", "🇨🇳🇺🇸", "❤\ufe0f", "☃", "✈\ufe0e"),
    *("1\ufe0f\u20e3", "#\ufe0f\u20e3", "🧑🏿\u200d🚀", "\u200d", "\ufe0f"),
)
_COMBINING = (
    *("e\u0301", "a\u0308\u0301", "\u0301", "n\u0303", "\u0915\u094d\u0937", "\u0e01\u0e47", "\u05e9\u05c1\u05b8"),
    *("\u3099か", "\u1100\u1161\u11a8", "\u20dd", "\u0345"),
)
_POOLS = (
    *((_WORDS.split(), 5), (_CONTRACTIONS, 3), (_NUMBERS.split(), 4), (_SPACES, 6), (_MARKS.split(), 4)),
    *((_EMOJI, 1), (_COMBINING, 1)),
)
_MOST_PIECES = 10


def draw_texts(number: int, seed: int = 0) -> list[str]:
    """Random texts of a few pieces each, without lone surrogates; the same for a seed, in one version of Python."""
    rng = random.Random(seed)
    pools = [pool for pool, _ in _POOLS]
    weights = [weight for _, weight in _POOLS]
    categories = list(_characters().values())
    texts = []
    for _ in range(number):
        pieces = []
        for _ in range(rng.randint(1, _MOST_PIECES)):
            if rng.random() < 0.12:
                pieces.append(rng.choice(rng.choice(categories)) * rng.choice((1, 1, 1, 2, 3)))
            elif rng.random() < 0.1:
                pieces.append("".join(map(chr, rng.choices(range(128), k=rng.randint(1, 4)))))
            else:
                pieces.append(rng.choice(rng.choices(pools, weights)[0]))
        texts.append("".join(pieces))
    return texts


@lru_cache(maxsize=1)
def _characters() -> dict[str, str]:
    """Unicode category -> its characters; without surrogates."""
    found: dict[str, list[str]] = {}
    for char in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(char)
        if category not in ("Cs", "Cn"):
            found.setdefault(category, []).append(char)
    return {category: "".join(chars) for category, chars in found.items()}
