"""Group reasons and notes that differ only in what they quote, so that one cause is listed once.

"the template drops the tool schema of get_weather" and "... of get_news" have one cause; a data set may name a thousand
tools. Only texts with the same code are compared: a code names a cause.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

GAP = "…"
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_WORD = re.compile(r"\w")
_NUMBER = re.compile(r"[\d,.]*\d")
_TURN_NUMBER = re.compile(r"^turn \d+(?P<role> \(\w+\))?(?P<colon>:)? ")
_MAX_ALIGNED = 2_000  # texts that are aligned word by word; later ones are only matched
_MAX_TOKENS = 400  # of a text that is aligned
_SHOWN_VALUES, _VALUE_LENGTH = 5, 60


@dataclass(slots=True)
class Cause:
    """Texts of one cause.

    Attributes:
        code: of all its texts.
        parts: what the texts have in common, in order; what differs lies between them.
        counts: text -> rows.
        rows: the first of them, as (file, number).
    """

    code: str
    parts: list[str]
    counts: Counter[str] = field(default_factory=Counter)
    rows: list[tuple[str, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.counts.total()

    @property
    def text(self) -> str:
        """What the texts have in common, and what stands in the gaps."""
        if len(self.parts) == 1:
            return self.parts[0]
        return f"{GAP.join(self.parts)} ({GAP}: {describe_values(self.values())})"

    def values(self) -> Counter[str]:
        """What the gaps hold -> rows."""
        found: Counter[str] = Counter()
        for text, count in self.counts.items():
            held = dict.fromkeys(value.strip() for value in _fill(self.parts, text) or ())
            found[", ".join(held)] += count
        return found

    def takes(self, text: str) -> bool:
        return _fill(self.parts, text) is not None


def group_causes(counts: Mapping[tuple[str, str], int]) -> list[Cause]:
    """Causes of (code, text) -> rows, the most frequent first."""
    by_code: defaultdict[str, list[Cause]] = defaultdict(list)
    with_gaps: defaultdict[str, list[Cause]] = defaultdict(list)
    num_aligned = 0
    for (code, text), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        cause = next((cause for cause in with_gaps[code] if cause.takes(text)), None)
        if cause is None and code:
            for other in by_code[code] if num_aligned < _MAX_ALIGNED else ():
                num_aligned += 1
                if common := _align(other.parts, text):
                    if len(other.parts) == 1:
                        with_gaps[code].append(other)
                    other.parts, cause = common, other
                    break
        if cause is None:
            cause = Cause(code, [text])
            by_code[code].append(cause)
        cause.counts[text] += count
    found = [cause for causes in by_code.values() for cause in causes]
    return sorted(found, key=lambda cause: (-cause.count, cause.text))


def describe_values(values: Counter[str]) -> str:
    """A range of numbers, or the most frequent values with their counts."""
    if all(_NUMBER.fullmatch(value) for value in values):
        numbers = sorted((float(value.replace(",", "")), value) for value in values if value.count(".") < 2)
        if len(numbers) == len(values):
            return f"{numbers[0][1]} to {numbers[-1][1]}"
    shown = [
        f"{value[:_VALUE_LENGTH] + '...' if len(value) > _VALUE_LENGTH else value or 'nothing'} {count:,}"
        for value, count in values.most_common(_SHOWN_VALUES)
    ]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f", {more:,} others" if more else "")


def _fill(parts: list[str], text: str) -> list[str] | None:
    """What a text has between the parts; None where it does not have the parts."""
    if len(parts) == 1:
        return [] if text == parts[0] else None
    first, *middle, last = parts
    if not (text.startswith(first) and text.endswith(last)) or len(text) < len(first) + len(last):
        return None
    at, end, values = len(first), len(text) - len(last), []
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return None
        values.append(text[at:found])
        at = found + len(part)
    return [*values, text[at:end]]


def _align(parts: list[str], text: str) -> list[str] | None:
    """The parts that both have in common; None unless more than half of their words are."""
    one, other = _TOKEN.findall(GAP.join(parts)), _TOKEN.findall(text)
    if max(len(one), len(other)) > _MAX_TOKENS:
        return None
    common = [""]
    for tag, _, _, start, end in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if tag == "equal":
            common[-1] += "".join(other[start:end])
        else:
            common.append("")
    # what stands between two gaps and holds no word belongs to what differs: get-weather, a.b
    joined = [part for i, part in enumerate(common) if i in (0, len(common) - 1) or _WORD.search(part)]
    num_words = sum(_count_words(_TOKEN.findall(part)) for part in joined)
    if 2 * num_words <= max(_count_words(one), _count_words(other)):
        return None
    fits = all(_fill(joined, before) is not None for before in (GAP.join(parts), text))
    return joined if fits else None


def _count_words(tokens: list[str]) -> int:
    return sum(bool(_WORD.match(token)) for token in tokens)


def without_number(text: str) -> str:
    """A reason for any turn: "turn 3: ..." begins behind the colon, and "turn 3 is empty" becomes "a turn is empty"."""
    return _TURN_NUMBER.sub(lambda found: "" if found["colon"] else f"a turn{found['role'] or ''} ", text, count=1)
