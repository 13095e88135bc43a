"""Detect the script in which a text is written, for the statistics of `check`."""

from __future__ import annotations

import unicodedata
from collections import Counter

_NAMES = {"CJK": "Chinese", "LATIN": "Latin script", "CYRILLIC": "Cyrillic", "HIRAGANA": "Japanese",
          "KATAKANA": "Japanese", "HANGUL": "Korean", "ARABIC": "Arabic", "GREEK": "Greek",
          "DEVANAGARI": "Devanagari", "HEBREW": "Hebrew", "THAI": "Thai"}  # fmt: skip


def script_of(line: str) -> str:
    """The script of most letters at the start of a line; Japanese if there are any kana."""
    scripts = Counter(
        _NAMES.get(unicodedata.name(char, "").split(" ")[0], "other") for char in line[:400] if char.isalpha()
    )
    if scripts["Japanese"]:
        return "Japanese"
    return scripts.most_common(1)[0][0] if scripts else "no letters"
