"""The ledger of a stream as JSON: it counts all rows and names the first ones, so that its size does not grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.ledger import FileLedger, Ledger
from tunesmith.data.numbers import CutRows, RowNumbers

LISTED_ROWS = 10_000  # of each reason and file

Lists = Mapping[str, Mapping[str, RowNumbers | CutRows]]


def save_ledger(ledger: Ledger, max_rows: int = LISTED_ROWS) -> dict[str, Any]:
    """A ledger from which counting goes on: also which rows were bad. Longer lists of rows are cut, here too."""
    for entry in ledger.files.values():
        for lists in _lists_of(entry).values():
            for rows in lists.values():
                rows.bound(max_rows)
    return describe_ledger(ledger) | {"bad": ledger.bad, "num_bad": ledger.num_bad}


def load_ledger(saved: Mapping[str, Any] | None) -> Ledger:
    """The ledger that `save_ledger` wrote; an empty one for None."""
    if saved is None:
        return Ledger()
    ledger = Ledger.from_json(saved)
    ledger.bad, ledger.num_bad = list(saved["bad"]), saved["num_bad"]
    for name, entry in ledger.files.items():
        lists = _lists_of(entry)
        for part, counts in saved["files"][name].get("unlisted", {}).items():
            for text, count in counts.items():
                lists[part][text].count_unlisted(count)
    return ledger


def describe_ledger(ledger: Ledger, is_lazy: bool = False) -> dict[str, Any]:
    """The ledger for data_ledger.json; `unlisted` of a file counts the rows that its lists do not name.

    Args:
        is_lazy: see `Ledger.to_json`.
    """
    described = ledger.to_json(is_lazy)
    for name, entry in ledger.files.items():
        unlisted = {
            part: {text: rows.unlisted for text, rows in lists.items() if rows.unlisted}
            for part, lists in _lists_of(entry).items()
        }
        if any(unlisted.values()):
            described["files"][name]["unlisted"] = unlisted
    return described


def _lists_of(entry: FileLedger) -> Lists:
    return {
        "refused": entry.refused,
        "notes": entry.notes,
        "rows": {"truncated": entry.truncated, "split": entry.split},
    }
