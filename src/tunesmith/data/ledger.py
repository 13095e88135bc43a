"""What became of every row: used, or refused with the reason. Printed before step 1, kept as data_ledger.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.config.data_keys import DataSection
from tunesmith.data.causes import Cause, group_causes, without_number
from tunesmith.data.fit import NOTE_CUT_REPLY
from tunesmith.data.labels import NOTE_UNKNOWN, Sample
from tunesmith.data.numbers import CutRows, RowNumbers
from tunesmith.errors import DataError
from tunesmith.rows.conversation import Conversation, Parsed, RawText, Segments
from tunesmith.sources.names import name_row
from tunesmith.sources.rowsize import RowTooLarge

_NAMED = 5  # bad rows that an error names one by one; the ledger has them all
_KEPT = 20  # rows that a problem names
_START = 200  # characters
_LOST_CONTEXT = "unread-context"  # code of refusals that are errors however few they are

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row with its outcome.

    Attributes:
        status: "used" or "refused".
        how: as_rendered, joined (data.chat_template none) or text; empty for refused rows.
        reason: why it was refused, or what was done to it ("truncated", "split"); empty otherwise.
        tokens_lost: tokens cut off its end.
        notes: other things worth counting.
        source: what was read, before it became tokens; None for a row of no known format.
        loses_context: refused because nothing reads something that its replies may depend on.
        is_by_choice: refused by a rule or a setting, not because the row is bad.
        code: cause of a refusal in kebab-case, which stays the same when the reason is reworded.
        raw: a refused row as it is in the file.
        num_cut: its replies that end before their stop token.
        system_prompt: that was drawn for it and added (data.system_prompts).
        loses_think: whether an empty think block of the template was removed (data.empty_think_share).
    """

    file: str
    number: int
    status: str
    how: str = ""
    reason: str = ""
    samples: Sequence[Sample] = ()
    tokens_lost: int = 0
    notes: tuple[str, ...] = ()
    is_by_choice: bool = False
    loses_context: bool = False
    source: Parsed | None = None
    code: str = ""
    raw: Any = None
    num_cut: int = 0
    system_prompt: str | None = None
    loses_think: bool = False

    @property
    def where(self) -> str:
        return name_row(self.file, self.number)

    def start(self, length: int = _START, as_in_file: bool = False) -> str:
        """How the row begins, on one line: its first question or text; of a row that was not parsed, its JSON.

        Args:
            as_in_file: JSON of a refused row in any case.
        """
        source = None if as_in_file else self.source
        text = " ".join(_say(source, self.raw, 4 * length).split())
        return text if len(text) <= length else f"{text[: length - 3]}..."


def _say(source: Parsed | None, raw: Any, length: int) -> str:
    """At least `length` characters of a row, where it has as many."""
    if isinstance(source, RawText):
        return source.text[:length]
    if isinstance(source, Segments):
        return "".join(text[:length] for text, _ in source.parts)[:length]
    if isinstance(source, Conversation):
        asked = (m.content for m in source.messages if m.role == "user" and m.content.strip())
        said = (m.content for m in source.messages if m.content.strip())
        return next(asked, next(said, ""))[:length]
    if raw is None or isinstance(raw, RowTooLarge):
        return ""
    found = ""
    for piece in _spell(raw):
        found += piece[:length]
        if len(found) >= length:
            break
    return found


def _spell(raw: Any) -> Iterator[str]:
    """A row as JSON, piece by piece; what JSON does not have, as Python prints it."""
    if isinstance(raw, str):
        return iter([raw])
    try:
        return json.JSONEncoder(ensure_ascii=False, default=str, skipkeys=True).iterencode(raw)
    except (ValueError, RecursionError):
        return iter([""])


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about rows that a person should know, at the same level in every command.

    Attributes:
        level: what `check` calls an error; warning; or note.
        count: rows.
        rows: the first of them, as (file, number).
        advice: what to do.
        code: of a refusal.
    """

    level: Level
    what: str
    count: int
    rows: list[tuple[str, int]]
    advice: str = ""
    code: str = ""


@dataclass
class FileLedger:
    rows: int = 0
    used: int = 0
    how: Counter[str] = field(default_factory=Counter)
    refused: dict[str, RowNumbers] = field(default_factory=dict)
    truncated: CutRows = field(default_factory=CutRows)
    split: RowNumbers = field(default_factory=RowNumbers)
    notes: dict[str, RowNumbers] = field(default_factory=dict)
    system_prompts_added: int = 0
    empty_think_removed: int = 0

    def merge(self, later: FileLedger) -> None:
        """Add the counts of later rows of the same file."""
        self.rows += later.rows
        self.used += later.used
        self.how.update(later.how)
        for own, others in ((self.refused, later.refused), (self.notes, later.notes)):
            for text, numbers in others.items():
                own.setdefault(text, RowNumbers()).extend(numbers)
        self.truncated.extend(later.truncated)
        self.split.extend(later.split)
        self.system_prompts_added += later.system_prompts_added
        self.empty_think_removed += later.empty_think_removed

    def to_json(self, is_lazy: bool = False) -> dict[str, Any]:
        """With `is_lazy`, row numbers stay as they are held, for `files.spell_json`."""
        keep: Callable[[Sequence[Any]], Any] = (lambda rows: rows) if is_lazy else list
        return {
            "rows": self.rows,
            "used": self.used,
            "how": dict(self.how),
            "refused": {reason: keep(rows) for reason, rows in self.refused.items()},
            "truncated": keep(self.truncated.records),
            "split": keep(self.split),
            "notes": {note: keep(rows) for note, rows in self.notes.items()},
            "system_prompts_added": self.system_prompts_added,
            "empty_think_removed": self.empty_think_removed,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> FileLedger:
        return cls(
            rows=saved["rows"],
            used=saved["used"],
            how=Counter(saved["how"]),
            refused={reason: RowNumbers(rows) for reason, rows in saved["refused"].items()},
            truncated=CutRows((cut["row"], cut["tokens_lost"]) for cut in saved["truncated"]),
            split=RowNumbers(saved["split"]),
            notes={note: RowNumbers(rows) for note, rows in saved["notes"].items()},
            system_prompts_added=saved.get("system_prompts_added", 0),
            empty_think_removed=saved.get("empty_think_removed", 0),
        )


@dataclass
class Ledger:
    """Counts over all rows, file by file."""

    files: dict[str, FileLedger] = field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0
    tokens_lost: int = 0
    num_samples: int = 0
    bad: list[str] = field(default_factory=list)
    num_bad: int = 0
    passed_over: list[str] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)  # reason of a refusal -> its code
    num_replies: int = 0
    num_cut: int = 0
    sources: dict[str, list[str]] = field(default_factory=dict)  # of a mix: name -> files

    def add(self, row: LabelledRow) -> None:
        self.add_outcome(row)
        for sample in row.samples:
            self.tokens += len(sample.input_ids)
            self.target_tokens += sample.num_targets
            self.num_replies += sample.num_replies if row.how != "text" else 0

    def add_outcome(self, row: LabelledRow) -> None:
        """Count a row, but not its tokens and replies."""
        entry = self.files.setdefault(row.file, FileLedger())
        entry.rows += 1
        for note in row.notes:
            entry.notes.setdefault(note, RowNumbers()).append(row.number)
        if row.status == "refused":
            entry.refused.setdefault(row.reason, RowNumbers()).append(row.number)
            self.codes[row.reason] = row.code
            if not row.is_by_choice:
                self.num_bad += 1
                if len(self.bad) < _NAMED:
                    self.bad.append(f"{row.where}: {row.reason}")
            return
        entry.used += 1
        entry.how[row.how] += 1
        entry.system_prompts_added += row.system_prompt is not None
        entry.empty_think_removed += row.loses_think
        if row.reason == "truncated":
            entry.truncated.append((row.number, row.tokens_lost))
            self.tokens_lost += row.tokens_lost
        elif row.reason == "split":
            entry.split.append(row.number)
        self.num_samples += len(row.samples)
        self.num_cut += row.num_cut

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files.values())

    @property
    def used(self) -> int:
        return sum(f.used for f in self.files.values())

    @property
    def refused(self) -> int:
        return self.rows - self.used

    @property
    def truncated(self) -> int:
        return sum(len(f.truncated) for f in self.files.values())

    @property
    def split(self) -> int:
        return sum(len(f.split) for f in self.files.values())

    @property
    def system_prompts_added(self) -> int:
        return sum(f.system_prompts_added for f in self.files.values())

    @property
    def empty_think_removed(self) -> int:
        return sum(f.empty_think_removed for f in self.files.values())

    def count_sources(self) -> list[int]:
        """Used rows of each source of a mix."""
        used = {name: entry.used for name, entry in self.files.items()}
        return [sum(used.get(file, 0) for file in files) for files in self.sources.values()]

    def count_how(self) -> Counter[str]:
        return sum((f.how for f in self.files.values()), Counter())

    def count_reasons(self) -> Counter[str]:
        """Refusals by cause, most frequent first; reasons that differ only in what they quote have one."""
        return Counter({cause.text: cause.count for cause in self.refusals()})

    def count_notes(self) -> Counter[str]:
        return Counter({cause.text: cause.count for cause in self.remarks()})

    def refusals(self) -> list[Cause]:
        """Why rows are refused, by cause, with the first rows of each; numbers of turns are left out."""
        return self._group(lambda entry: entry.refused, lambda reason: self.codes.get(reason) or reason)

    def remarks(self) -> list[Cause]:
        """Notes by cause, with the first rows of each. Those about unread keys differ in the key alone."""
        return self._group(lambda entry: entry.notes, lambda note: "unread" if note.endswith(" is not read") else note)

    def _group(
        self, texts_of: Callable[[FileLedger], dict[str, RowNumbers]], code_of: Callable[[str], str]
    ) -> list[Cause]:
        counts: Counter[tuple[str, str]] = Counter()
        for entry in self.files.values():
            for text, numbers in texts_of(entry).items():
                counts[code_of(text), without_number(text)] += len(numbers)
        causes = group_causes(counts)
        cause_of = {text: cause for cause in causes for text in cause.counts}
        for name, entry in self.files.items():
            rows: dict[int, list[int]] = {}
            for text, numbers in texts_of(entry).items():
                rows.setdefault(id(cause_of[without_number(text)]), []).extend(numbers[:_KEPT])
            for cause in causes:
                named = sorted(rows.get(id(cause), ()))[: _KEPT - len(cause.rows)]
                cause.rows += [(name, number) for number in named]
        return causes

    def problems(self, data: DataSection) -> list[Problem]:
        """Refusals and notes as problems: what `check` reports and `train` prints before step 1."""
        is_over = self.num_bad > data.max_refused * self.rows or not self.used
        advice = f"data.max_refused allows {data.max_refused:.1%} of the rows" if is_over else ""
        found = []
        for cause in self.refusals():
            level: Level = "error" if is_over or cause.code == _LOST_CONTEXT else "warning"
            found.append(Problem(level, f"refused: {cause.text}", cause.count, cause.rows, advice, cause.code))
        for cause in self.remarks():
            level = "note"
            advice = ""
            if cause.text == NOTE_CUT_REPLY:
                level = "error" if self.is_cut_over(data.max_cut_replies) else "warning"
                advice = self.describe_cut(data.max_cut_replies)
            elif cause.text == NOTE_UNKNOWN:
                level = "error"
                advice = "use a byte-level tokenizer or one with byte fallback, or correct the rows"
            found.append(Problem(level, cause.text, cause.count, cause.rows, advice))
        return found

    def describe_draws(self, data: DataSection) -> list[str]:
        """How many rows were changed by what data.system_prompts and data.empty_think_share drew."""
        lines = []
        if data.system_prompts:
            why = "" if self.system_prompts_added else ": chats with a system prompt or tools and raw text get none"
            share = f"data.system_prompt_share {data.system_prompt_share:g}"
            lines.append(f"system prompt added to {self.system_prompts_added:,} rows ({share}){why}")
        if data.empty_think_share < 1:
            why = "" if self.empty_think_removed else ": the template wrote none in the rows drawn"
            share = f"data.empty_think_share {data.empty_think_share:g}"
            lines.append(f"empty think block removed from {self.empty_think_removed:,} rows ({share}){why}")
        return lines

    def is_cut_over(self, max_cut_replies: float) -> bool:
        return self.num_cut > max_cut_replies * self.num_replies

    def describe_cut(self, max_cut_replies: float) -> str:
        """The share of cut replies, the limit, and what to do; of an older run's ledger only the last."""
        advice = "raise data.max_seq_len, or leave long rows out with data.overlong drop"
        if not self.num_replies:
            return advice
        share = f"{self.num_cut:,} of {self.num_replies:,} replies ({self.num_cut / self.num_replies:.1%})"
        return f"{share}; data.max_cut_replies allows {max_cut_replies:.1%}; {advice}"

    def raise_if_cut(self, max_cut_replies: float, max_seq_len: int) -> None:
        """End the command where too many replies would be trained without their stop token.

        Raises:
            DataError: with the share, a length that would do, and the keys to change.
        """
        if not self.is_cut_over(max_cut_replies):
            return
        lost = {(name, row): tokens for name, entry in self.files.items() for row, tokens in entry.truncated}
        cut = [
            (name, row, lost.get((name, row), 0))
            for name, entry in self.files.items()
            for row in entry.notes.get(NOTE_CUT_REPLY, ())
        ]
        examples = "\n".join(
            f"  {name_row(name, row)}: {tokens:,} tokens cut off" for name, row, tokens in cut[:_NAMED]
        )
        more = f"\n  ... and {len(cut) - _NAMED:,} more rows" if len(cut) > _NAMED else ""
        kept_short = int(max_cut_replies * self.num_replies)
        needed = sorted((tokens for *_, tokens in cut), reverse=True)[min(kept_short, len(cut) - 1)]
        enough = -(-(max_seq_len + needed) // 64) * 64
        share = self.num_cut / self.num_replies
        raise DataError(
            f"{self.num_cut:,} of {self.num_replies:,} replies ({share:.1%}) are cut before their stop token, so the "
            f"model would learn to go on where it should end; data.max_cut_replies allows {max_cut_replies:.1%}:\n"
            f"{examples}{more}\n"
            f"Raise --data.max_seq_len from {max_seq_len} (to {enough}, if the model takes that many tokens), leave "
            "long rows out with --data.overlong drop, or allow it with a higher --data.max_cut_replies.",
            code="too-many-cut-replies",
        )

    def raise_if_unusable(self, max_refused: float) -> None:
        """End the command where too many rows are bad, or none is left.

        Raises:
            DataError: naming the first bad rows and what to do.
        """
        if self.num_bad > max_refused * self.rows or not self.used:
            examples = "\n".join(f"  {line}" for line in self.bad)
            more = f"\n  ... and {self.num_bad - len(self.bad)} more" if self.num_bad > len(self.bad) else ""
            advice = "Correct these rows" + (
                ", or leave them out with a higher --data.max_refused." if self.used else "."
            )
            if self.num_bad > max_refused * self.rows:
                share = self.num_bad / self.rows
                raise DataError(
                    f"{self.num_bad} of {self.rows} rows ({share:.1%}) cannot be trained on; data.max_refused allows "
                    f"{max_refused:.1%}:\n{examples}{more}\n{advice}",
                    code="too-many-refused",
                )
            reasons = "; ".join(f"{reason} ({count} rows)" for reason, count in self.count_reasons().items())
            bad = f"\n{examples}{more}\n{advice}" if self.num_bad else ""
            raise DataError(f"no row can be trained on: {reasons or 'no rows were read'}.{bad}", code="no-usable-rows")

    def merge(self, later: Ledger) -> None:
        """Add the counts of later rows, so that the sum is that of one ledger over all rows."""
        for name, entry in later.files.items():
            self.files.setdefault(name, FileLedger()).merge(entry)
        self.tokens += later.tokens
        self.target_tokens += later.target_tokens
        self.tokens_lost += later.tokens_lost
        self.num_samples += later.num_samples
        self.bad += later.bad[: _NAMED - len(self.bad)]
        self.num_bad += later.num_bad
        self.codes |= later.codes
        self.num_replies += later.num_replies
        self.num_cut += later.num_cut

    def to_json(self, is_lazy: bool = False) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "used": self.used,
            "refused": self.refused,
            "truncated": self.truncated,
            "split": self.split,
            "samples": self.num_samples,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "tokens_lost": self.tokens_lost,
            "replies": self.num_replies,
            "cut_replies": self.num_cut,
            "system_prompts_added": self.system_prompts_added,
            "empty_think_removed": self.empty_think_removed,
            "passed_over": self.passed_over,
            "codes": self.codes,
            **({"sources": self.sources} if self.sources else {}),
            "files": {name: entry.to_json(is_lazy) for name, entry in self.files.items()},
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Ledger:
        """What `to_json` wrote, also in earlier versions; which rows were bad is not kept apart."""
        return cls(
            {name: FileLedger.from_json(entry) for name, entry in saved["files"].items()},
            saved["tokens"], saved["target_tokens"], saved["tokens_lost"], saved["samples"],
            passed_over=saved["passed_over"], codes=saved.get("codes", {}), num_replies=saved.get("replies", 0),
            num_cut=saved.get("cut_replies", 0), sources=saved.get("sources", {}),
        )  # fmt: skip
