"""Examine a whole data set before training: findings, each with its rows."""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tunesmith.config.data_keys import DataSection
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.scripts import script_of
from tunesmith.encode.encoder import Encoder
from tunesmith.rows.conversation import Conversation, RawText
from tunesmith.sources.names import name_row

_NAMED = 20  # rows that a finding names
_NAMED_TWICE = "rows read twice, since data.train names their file twice"
_MAX_NEAR = 200_000  # rows compared for near-duplicates: their hashes stay in memory
_SIMILAR = 0.8  # Jaccard similarity of word triples
_NUM_PERM = 128
_COMPARED = 100_000  # characters of a row that are compared for near-duplicates
_SHORT_SHARE = 0.05
_TAIL = 0.99
_MAX_STARTS = 20_000  # beginnings of refused and noted rows that stay in memory
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A row with a finding.

    Attributes:
        start: how it begins, on one line.
        sign: how it relates to `twin`, another row: = (the same text) or ~ (nearly).
        twin: as `where`, or "".
    """

    file: str
    number: int
    start: str = ""
    sign: str = ""
    twin: str = ""

    @property
    def where(self) -> str:
        return name_row(self.file, self.number) + (f" {self.sign} {self.twin}" if self.twin else "")


@dataclass
class Finding:
    """A problem, or something odd, with the rows where.

    Attributes:
        level: error (the command ends with 1) or warning.
        count: rows; or other things where `places` is empty.
        places: the first rows.
        code: of a refusal; it stays the same when `what` is reworded.
    """

    level: Literal["error", "warning"]
    what: str
    advice: str = ""
    count: int = 0
    places: list[Place] = field(default_factory=list)
    code: str = ""

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.places) < _NAMED:
            self.places.append(place)

    @property
    def rows(self) -> list[str]:
        """The first rows as file:row."""
        return [place.where for place in self.places]

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "what": self.what,
            "code": self.code or None,
            "count": self.count,
            "rows": self.rows,
            "starts": [place.start for place in self.places],
            "advice": self.advice,
        }


class Findings:
    """Findings by name, in the order in which they are declared."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, what: str, place: Place, level: Literal["error", "warning"] = "warning", advice: str = "") -> None:
        self._found.setdefault(what, Finding(level, what, advice)).add(place)

    def note(
        self,
        what: str,
        count: int,
        level: Literal["error", "warning"] = "warning",
        advice: str = "",
        places: Iterable[Place] = (),
        code: str = "",
    ) -> None:
        self._found[what] = Finding(level, what, advice, count, list(places), code)

    def sorted(self) -> list[Finding]:
        return sorted(self._found.values(), key=lambda finding: (finding.level != "error", -finding.count))


class Starts:
    """How the rows begin that a cause in the ledger may name: of each reason and note, the first."""

    def __init__(self) -> None:
        self._starts: dict[tuple[str, int], str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, row: LabelledRow) -> None:
        texts = [*row.notes, *([row.reason] if row.status == "refused" else [])]
        if len(self._starts) < _MAX_STARTS and any(self._counts[text] < _NAMED for text in texts):
            self._starts[row.file, row.number] = row.start()
        self._counts.update(texts)

    def place(self, file: str, number: int) -> Place:
        return Place(file, number, self._starts.get((file, number), ""))


class NearDuplicates:
    """MinHash over word triples (Broder 1997), by the datasketch library; without it nothing is looked for."""

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            self._lsh = None
            return
        self._empty = MinHash(num_perm=_NUM_PERM)  # drawing its permutations takes as long as sketching a short row
        self._lsh = MinHashLSH(threshold=_SIMILAR, num_perm=_NUM_PERM)
        self._kept: list[str] = []  # rows, by their number in the index

    @property
    def is_available(self) -> bool:
        return self._lsh is not None

    def find(self, text: str, where: str, keep: bool) -> str | None:
        """The first row like this one; `keep` it for those that follow."""
        if self._lsh is None or len(words := _WORD.findall(text[:_COMPARED].casefold())) < 6:
            return None
        sketch = self._empty.copy()
        sketch.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        near = self._lsh.query(sketch)
        if keep and not near and len(self._kept) < _MAX_NEAR:
            self._lsh.insert(len(self._kept), sketch)
            self._kept.append(where)
        return self._kept[min(near)] if near else None


class SeenTexts:
    """Texts met so far, by a 64-bit hash, in 16 bytes each: a dict of the last ones, sorted arrays of the rest."""

    def __init__(self, recent: int = 1 << 18) -> None:
        self._recent: dict[int, int] = {}
        self._limit = recent
        self._keys, self._places = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
        self._files: list[str] = []

    def find(self, text: str) -> str | None:
        """The first row with this very text, as file:row."""
        key = _hash(text)
        place = self._recent.get(key)
        if place is None:
            index = int(np.searchsorted(self._keys, np.uint64(key)))
            if index == len(self._keys) or int(self._keys[index]) != key:
                return None
            place = int(self._places[index])
        return name_row(self._files[place >> 40], place & ((1 << 40) - 1))

    def add(self, text: str, file: str, number: int) -> None:
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._recent[_hash(text)] = (len(self._files) - 1) << 40 | number
        if len(self._recent) >= self._limit:
            keys = np.concatenate([self._keys, np.fromiter(self._recent, dtype=np.uint64)])
            places = np.concatenate([self._places, np.fromiter(self._recent.values(), dtype=np.uint64)])
            order = np.argsort(keys)
            self._keys, self._places = keys[order], places[order]
            self._recent.clear()


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Check:
    """What a check counted and found.

    Attributes:
        lengths: tokens of every sample before it was cut.
        languages: rows by script.
        drawn: how many rows were changed by what the config's shares drew.
    """

    ledger: Ledger
    eval_ledger: Ledger
    findings: Findings
    lengths: array[int] = field(default_factory=lambda: array("I"))
    languages: Counter[str] = field(default_factory=Counter)
    starts: Starts = field(default_factory=Starts)
    looked_for_near: bool = True
    drawn: list[str] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings.sorted())

    @property
    def num_warnings(self) -> int:
        return len(self.findings.sorted()) - self.num_errors

    def percentiles(self) -> dict[str, int]:
        if not self.lengths:
            return {}
        values = np.percentile(np.array(self.lengths), [50, 90, 99, 100])
        return dict(zip(("median", "90 %", "99 %", "longest"), (int(value) for value in values), strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": self.num_errors,
            "findings": [finding.to_json() for finding in self.findings.sorted()],
            "data": self.ledger.to_json(),
            "eval_data": self.eval_ledger.to_json(),
            "lengths": self.percentiles(),
            "languages": dict(self.languages),
            "looked_for_near_duplicates": self.looked_for_near,
        }


def check_rows(
    rows: Iterable[LabelledRow], eval_rows: Iterable[LabelledRow], encoder: Encoder, data: DataSection, max_seq_len: int
) -> Check:
    """Read every row once, in bounded memory: 20 bytes a row are kept (and sketches of the first 200,000)."""
    check = Check(Ledger(), Ledger(), Findings())
    near = NearDuplicates()
    check.looked_for_near = near.is_available
    seen = SeenTexts()
    for row in rows:
        check.ledger.add(row)
        check.starts.add(row)
        _look_at_row(row, check, encoder, data.train_on)
        text = text_of(row)
        if not text:
            continue
        check.languages[script_of(text)] += 1
        if twin := seen.find(text):
            if twin == row.where:
                check.findings.add(
                    _NAMED_TWICE, place_of(row), advice="name the file once, unless they shall count double"
                )
            else:
                check.findings.add("duplicate rows", place_of(row, "=", twin), advice="they count double")
            continue
        seen.add(text, row.file, row.number)
        if twin := near.find(text, row.where, keep=True):
            check.findings.add("near-duplicate rows", place_of(row, "~", twin), advice="they count nearly double")
    for row in eval_rows:
        check.eval_ledger.add(row)
        text = text_of(row)
        if text and (twin := seen.find(text)):
            check.findings.add(
                "evaluation rows that are also in the training data", place_of(row, "=", twin), "error",
                "the evaluation would measure memory; remove them from one of the two",
            )  # fmt: skip
        elif text and (twin := near.find(text, row.where, keep=False)):
            check.findings.add("evaluation rows nearly in the training data", place_of(row, "~", twin))
    _look_at_whole(check, data, max_seq_len)
    check.drawn = check.ledger.describe_draws(data)
    if encoder.drops_text:
        advice = "take a byte-level tokenizer, or one with byte fallback"
        check.findings.note("the tokenizer leaves out characters that it cannot write", 1, advice=advice)
    return check


def place_of(row: LabelledRow, sign: str = "", twin: str = "") -> Place:
    return Place(row.file, row.number, row.start(), sign, twin)


def _look_at_row(row: LabelledRow, check: Check, encoder: Encoder, train_on: str) -> None:
    if row.status == "refused":
        return
    found: list[tuple[str, Literal["error", "warning"], str]] = []
    if row.tokens_lost:
        found.append(("rows cut to data.max_seq_len", "warning", ""))
    bos = encoder.bos_id
    for sample in row.samples:
        check.lengths.append(len(sample.input_ids))
        if bos is not None and len(sample.input_ids) > 1 and sample.input_ids[0] == sample.input_ids[1] == bos:
            found.append(("doubled BOS at the start", "error", "the template and the data both write it"))
    if row.tokens_lost and check.lengths:
        check.lengths[-1] += row.tokens_lost
    if isinstance(row.source, Conversation):
        if train_on != "all" and not _trains_stops(row, encoder.stop_ids):
            found.append(("the stop token is not trained", "error", "the model would never learn to end its reply"))
        found += [(what, "warning", "") for what in odd_turns(row.source)]
    if found:
        place = place_of(row)
        for what, level, advice in dict.fromkeys(found):
            check.findings.add(what, place, level, advice)


def _trains_stops(row: LabelledRow, stop_ids: list[int]) -> bool:
    """Whether every stretch of trained tokens ends with the stop token, as seen in the samples alone."""
    for sample in row.samples:
        mask = np.append(sample.loss_mask, 0)
        last = np.flatnonzero((mask[:-1] == 1) & (mask[1:] == 0))
        if _has_gaps(row):
            last = last[-1:]  # the row itself excludes what comes before
        if row.reason and last.size and last[-1] == len(sample.loss_mask) - 1:
            last = last[:-1]  # cut, which has a finding of its own
        if not np.isin(sample.input_ids[last], stop_ids).all():
            return False
    return True


def _has_gaps(row: LabelledRow) -> bool:
    return isinstance(row.source, Conversation) and any(message.context_spans for message in row.source.messages)


def odd_turns(conversation: Conversation) -> Iterator[str]:
    """What is odd about the order and the replies of a chat."""
    roles = [message.role for message in conversation.messages]
    if "system" in roles[1:]:
        yield "a system turn that is not the first"
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] != "user":
        yield "begins with an assistant's or a tool's turn"
    if any(a == b and a != "tool" for a, b in itertools.pairwise(spoken)):
        yield "two turns of one role in a row"
    for message in conversation.messages:
        if message.role == "assistant" and message.is_trained and not message.tool_calls:
            words = len(_WORD.findall(message.content))
            if words == 0:
                yield "a reply without a word"
            elif words == 1:
                yield "a reply of one word"


def _look_at_whole(check: Check, data: DataSection, max_seq_len: int) -> None:
    ledger, findings = check.ledger, check.findings
    for problem in ledger.problems(data):
        places = [check.starts.place(file, number) for file, number in problem.rows]
        level: Literal["error", "warning"] = "error" if problem.level == "error" else "warning"
        findings.note(problem.what, problem.count, level, problem.advice, places, problem.code)
    if ledger.tokens and ledger.target_tokens / ledger.tokens < _SHORT_SHARE:
        share = ledger.target_tokens / ledger.tokens
        findings.note(f"only {share:.1%} of all tokens are trained", 1, advice="long questions, short replies")
    if check.lengths:
        tail = int(np.percentile(np.array(check.lengths), 100 * _TAIL))
        longest = max(check.lengths)
        if longest > 2 * tail and longest > 256 and max_seq_len > 2 * tail:
            fits = max(64, -(-tail // 64) * 64)
            advice = f"--data.max_seq_len {fits} holds 99 % of the samples; the longest has {longest} tokens"
            findings.note("a long tail of lengths", sum(length > fits for length in check.lengths), advice=advice)


def text_of(row: LabelledRow) -> str:
    """What a row says, for comparing rows; empty for refused ones."""
    if row.status == "refused":
        return ""
    if isinstance(row.source, RawText):
        return row.source.text.strip() + row.source.digest
    if isinstance(row.source, Conversation):
        said = [f"{m.role}: {m.reasoning_content or ''} {m.content} {m.tool_calls or ''}" for m in row.source.messages]
        return "\n".join([*said, f"{row.source.tools or ''}"]).strip()
    return ""
