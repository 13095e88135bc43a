"""What became of every row: used, or refused with the reason. Printed before step 1, kept as data_ledger.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.labels import Sample
from tunesmith.errors import DataError
from tunesmith.rows.conversation import Parsed

TURN_NUMBER = re.compile(r"^turn \d+(?: \(\w+\))?:? ")
_NAMED = 5  # bad rows that an error names one by one; the ledger has them all


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row with its outcome.

    Attributes:
        status: "used" or "refused".
        how: as_rendered, joined (data.chat_template none) or text; empty for refused rows.
        reason: why it was refused, or what was done to it ("truncated", "split"); empty otherwise.
        tokens_lost: tokens cut off its end.
        notes: other things worth counting.
        source: what was read, before it became tokens; None where it could not be.
        loses_context: refused because nothing reads something that its replies may depend on.
        is_by_choice: refused by a rule or a setting, not because the row is bad.
        code: cause of a refusal in kebab-case, which stays the same when the reason is reworded.
    """

    file: str
    number: int
    status: str
    how: str = ""
    reason: str = ""
    samples: tuple[Sample, ...] = ()
    tokens_lost: int = 0
    notes: tuple[str, ...] = ()
    is_by_choice: bool = False
    loses_context: bool = False
    source: Parsed | None = None
    code: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass
class FileLedger:
    rows: int = 0
    used: int = 0
    how: Counter[str] = field(default_factory=Counter)
    refused: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[tuple[int, int]] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)


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

    def add(self, row: LabelledRow) -> None:
        entry = self.files.setdefault(row.file, FileLedger())
        entry.rows += 1
        for note in row.notes:
            entry.notes.setdefault(note, []).append(row.number)
        if row.status == "refused":
            entry.refused.setdefault(row.reason, []).append(row.number)
            if not row.is_by_choice:
                self.num_bad += 1
                if len(self.bad) < _NAMED:
                    self.bad.append(f"{row.where}: {row.reason}")
            return
        entry.used += 1
        entry.how[row.how] += 1
        if row.reason == "truncated":
            entry.truncated.append((row.number, row.tokens_lost))
            self.tokens_lost += row.tokens_lost
        elif row.reason == "split":
            entry.split.append(row.number)
        self.num_samples += len(row.samples)
        self.tokens += sum(len(sample.input_ids) for sample in row.samples)
        self.target_tokens += sum(sample.num_targets for sample in row.samples)

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

    def count_how(self) -> Counter[str]:
        return sum((f.how for f in self.files.values()), Counter())

    def count_reasons(self) -> Counter[str]:
        """Refusals by reason, most frequent first; turn numbers are left out so that like goes with like."""
        counts: Counter[str] = Counter()
        for entry in self.files.values():
            for reason, rows in entry.refused.items():
                counts[TURN_NUMBER.sub("", reason)] += len(rows)
        return counts

    def count_notes(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for entry in self.files.values():
            for note, rows in entry.notes.items():
                counts[note] += len(rows)
        return counts

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

    def to_json(self) -> dict[str, Any]:
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
            "passed_over": self.passed_over,
            "files": {
                name: {
                    "rows": entry.rows,
                    "used": entry.used,
                    "how": dict(entry.how),
                    "refused": entry.refused,
                    "truncated": [{"row": row, "tokens_lost": lost} for row, lost in entry.truncated],
                    "split": entry.split,
                    "notes": entry.notes,
                }
                for name, entry in self.files.items()
            },
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Ledger:
        """What `to_json` wrote; which rows were bad is not kept apart."""
        files = {
            name: FileLedger(
                rows=entry["rows"],
                used=entry["used"],
                how=Counter(entry["how"]),
                refused=entry["refused"],
                truncated=[(cut["row"], cut["tokens_lost"]) for cut in entry["truncated"]],
                split=entry["split"],
                notes=entry["notes"],
            )
            for name, entry in saved["files"].items()
        }
        return cls(
            files, saved["tokens"], saved["target_tokens"], saved["tokens_lost"], saved["samples"],
            passed_over=saved["passed_over"],
        )  # fmt: skip
