"""Detect the script in which a text is written, for the statistics of `check`."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

_NAMES = {"CJK": "Chinese", "LATIN": "Latin script", "CYRILLIC": "Cyrillic", "HIRAGANA": "Japanese",
          "KATAKANA": "Japanese", "HANGUL": "Korean", "ARABIC": "Arabic", "GREEK": "Greek",
          "DEVANAGARI": "Devanagari", "HEBREW": "Hebrew", "THAI": "Thai"}  # fmt: skip


def script_of(line: str) -> str:
    """The script of most letters at the start of a line; Japanese if there are any kana."""
    scripts: Counter[str] = Counter()
    for char, count in Counter(line[:400]).items():
        if script := _script_of_letter(char):
            scripts[script] += count
    if scripts["Japanese"]:
        return "Japanese"
    return scripts.most_common(1)[0][0] if scripts else "no letters"


@lru_cache(maxsize=1 << 16)
def _script_of_letter(char: str) -> str:
    """The script's name; "" for a character that is no letter."""
    return _NAMES.get(unicodedata.name(char, "").split(" ")[0], "other") if char.isalpha() else ""
