"""Compare a reply with its reference without any library: exact match and ROUGE-L, in training and in evaluation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from fractions import Fraction

import regex

NORMALISATION = (
    "Unicode NFKC, case folded, white space runs as one space, without white space and .,;:!? and their full-width "
    "forms at the end"
)
_ENDING = " .,;:!?\u3002\u3001"
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u30fc"  # no spaces
_OTHER = rf"\p{{L}}\p{{M}}\p{{Nd}}--[{_UNSPACED}\p{{Latin}}a-z0-9]"
_WORD = regex.compile(
    rf"[a-z0-9]+|[{_UNSPACED}]|[[{_OTHER}]--\p{{M}}][{_OTHER}]*", regex.V1
)  # fmt: skip


def normalize(text: str) -> str:
    """The text as exact match compares it (see NORMALISATION)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = " ".join(folded.split())
    return words.rstrip(_ENDING) or words  # "?" is not the empty reply


def matches_exactly(reply: str, reference: str) -> bool:
    return normalize(reply) == normalize(reference)


def split_words(text: str) -> list[str]:
    """Words for ROUGE and for repetition, in small letters.

    Runs of a-z and 0-9, as rouge-score finds them; it drops all else. Of scripts that it drops whole, words; of those
    written without spaces between words (Chinese, Japanese, Thai, ...), characters.
    """
    words: list[str] = _WORD.findall(text.lower())
    return words


def rouge_l(reply: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L); 0 where either text has no words."""
    return rouge_l_of_words(split_words(reply), split_words(reference))


def rouge_l_of_words(reply: Sequence[str], reference: Sequence[str]) -> float:
    if not reply or not reference:
        return 0.0
    length = lcs_length(reference, reply)
    precision, recall = length / len(reply), length / len(reference)
    return 2 * precision * recall / (precision + recall) if length else 0.0


def lcs_length(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the usual table is the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(one)) - 1
    unmatched = everything
    for word in two:
        found = unmatched & places.get(word, 0)
        unmatched = ((unmatched + found) | (unmatched - found)) & everything
    return len(one) - unmatched.bit_count()


_BOXED = regex.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = regex.compile(r"\\d?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = regex.compile(
    r"(?<![0-9A-Za-z_.])[-+]?(?:[$€£¥]\s?)?(?:(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?|(\.\d+))(?:\s?/\s?(\d+))?(?!\d)"
)


def final_number(text: str) -> Fraction | None:
    """The number that a worked answer ends in, exactly; None where there is none.

    It is the one behind the last "####" (GSM8K), else in the last \\boxed{}, else the last of the text. 1,234 is 1234,
    3/4 and \\frac{3}{4} are fractions, and currency and units beside it do not matter.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2013", "-")
    boxed = _BOXED.findall(plain)
    if "####" in plain:
        plain = plain.rpartition("####")[2]
    elif boxed:
        plain = boxed[-1]
    plain = _FRACTION.sub(r"\1/\2", plain.replace("\\$", "$").replace("{,}", ",").replace("\\,", ""))
    numbers = list(_NUMBER.finditer(plain))
    if not numbers:
        return None
    found = numbers[-1]
    whole, decimals, below = (found[1] or "0").replace(",", ""), found[2] or found[3] or "", found[4]
    if below is not None and not int(below):
        return None
    number = Fraction(f"{whole}{decimals}") / int(below or 1)
    return -number if found[0].startswith("-") else number
