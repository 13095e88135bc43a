"""The language of a text by its script: enough to see that something is not what one thought."""

from __future__ import annotations

import unicodedata
from collections import Counter

_SCRIPTS = {"CJK": "Chinese", "LATIN": "Latin script", "CYRILLIC": "Cyrillic", "HIRAGANA": "Japanese",
            "KATAKANA": "Japanese", "HANGUL": "Korean", "ARABIC": "Arabic", "GREEK": "Greek",
            "DEVANAGARI": "Devanagari", "HEBREW": "Hebrew", "THAI": "Thai"}  # fmt: skip


def language_of(line: str) -> str:
    """By script: Chinese, Japanese where kana occur, else the script of most letters."""
    scripts = Counter(
        _SCRIPTS.get(unicodedata.name(char, "").split(" ")[0], "other") for char in line[:400] if char.isalpha()
    )
    if scripts["Japanese"]:
        return "Japanese"
    return scripts.most_common(1)[0][0] if scripts else "no letters"
