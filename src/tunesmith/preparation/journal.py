"""How far a preparation is, so that one that was killed continues from there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tunesmith.data.ledger import FileLedger, Ledger
from tunesmith.data.numbers import CutRows, RowNumbers
from tunesmith.data.store import StoreWriter
from tunesmith.files import read_sealed, spell_sealed, write_text_atomic

COMMIT_S = 10.0  # at most this much work is lost

_SUMS = ("tokens", "target_tokens", "tokens_lost", "num_samples", "num_bad", "num_replies", "num_cut")


class Journal:
    """The last committed state of a store that is being written, and the ledger of the rows so far.

    Args:
        folder: of journal.json and the parts of the ledger.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "journal.json"
        self._num_parts = self._rows = 0
        self._next = time.monotonic() + COMMIT_S

    def open(self, store: Path) -> tuple[StoreWriter, Ledger]:
        """A writer that continues after the last commit, or begins, and the ledger of the rows before.

        Raises:
            ValueError, OSError: what was written is damaged.
        """
        if not self._path.exists():
            return StoreWriter(store), Ledger()
        try:
            saved = read_sealed(self._path)
            ledger = Ledger()
            for number in range(saved["parts"]):
                ledger.merge(ledger_from_saved(read_sealed(self._part(number))))
            writer = StoreWriter(store, saved["state"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        self._num_parts, self._rows = saved["parts"], ledger.rows
        return writer, ledger

    @property
    def rows(self) -> int:
        """Rows up to the last commit."""
        return self._rows

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def commit(self, writer: StoreWriter, recent: Ledger) -> None:
        """Args:
        recent: of the rows since the last commit.
        """
        state = writer.commit()
        write_text_atomic(self._part(self._num_parts), spell_sealed(ledger_to_saved(recent)))
        self._num_parts += 1
        write_text_atomic(self._path, spell_sealed({"parts": self._num_parts, "state": state}))
        self._rows += recent.rows
        self._next = time.monotonic() + COMMIT_S

    def remove(self) -> None:
        """The store is complete."""
        self._path.unlink(missing_ok=True)
        for part in self._folder.glob("ledger-*.json"):
            part.unlink()

    def _part(self, number: int) -> Path:
        return self._folder / f"ledger-{number:06}.json"


def ledger_to_saved(ledger: Ledger) -> dict[str, Any]:
    """A ledger as JSON of bounded size a run of rows, with all that it holds."""
    files = {
        name: {
            **{key: getattr(entry, key) for key in ("rows", "used", "system_prompts_added", "empty_think_removed")},
            "how": dict(entry.how),
            "refused": {reason: rows.to_runs() for reason, rows in entry.refused.items()},
            "notes": {note: rows.to_runs() for note, rows in entry.notes.items()},
            "split": entry.split.to_runs(),
            "truncated": [number for cut in entry.truncated for number in cut],
        }
        for name, entry in ledger.files.items()
    }
    sums = {key: getattr(ledger, key) for key in _SUMS}
    return {**sums, "files": files, "bad": ledger.bad, "codes": ledger.codes}


def ledger_from_saved(saved: dict[str, Any]) -> Ledger:
    from_runs = RowNumbers.from_runs
    files = {}
    for name, entry in saved["files"].items():
        counts = {key: entry[key] for key in ("rows", "used", "system_prompts_added", "empty_think_removed")}
        own = files[name] = FileLedger(**counts)
        own.how.update(entry["how"])
        own.refused.update({reason: from_runs(rows) for reason, rows in entry["refused"].items()})
        own.notes.update({note: from_runs(rows) for note, rows in entry["notes"].items()})
        own.split = from_runs(entry["split"])
        numbers = iter(entry["truncated"])
        own.truncated = CutRows(zip(numbers, numbers, strict=True))
    return Ledger(files, **{key: saved[key] for key in _SUMS}, bad=saved["bad"], codes=saved["codes"])
