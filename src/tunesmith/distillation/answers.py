"""What `tunesmith generate` leaves: the answers, and the ledger beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed
from tunesmith.reading import open_file

_SHOWN = 5  # reasons of refusals
_LONGEST_LINE = 2**26  # bytes


@dataclass(frozen=True, slots=True)
class Answers:
    """A file of answers, which train takes as data.

    Attributes:
        path: the file.
        ledger: what became of each row and sample, the settings and the model; the content of NAME.ledger.json.
    """

    path: Path
    ledger: Mapping[str, Any]

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        samples = self.ledger["samples"]
        return f"Answers({str(self.path)!r}: {samples['kept']:,} of {samples['samples']:,} samples)"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The answers, one after another."""
        with open_file(self.path) as file:
            for line in file:
                yield json.loads(line)


def read_ledger(path: Path) -> dict[str, Any] | None:
    """The ledger of answers; None where there is none.

    Raises:
        TunesmithError: it is damaged.
    """
    try:
        content = read_sealed(path)
        return {**content, "samples": dict(content["samples"]), "output": dict(content["output"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise TunesmithError(
            f"{path}: is damaged or not a ledger of answers. Give --overwrite to replace it, or another --output.",
            code="generation-damaged",
        ) from None


def holds_rejected(path: Path) -> bool:
    """Whether a file is one that `--rejected` has written, by its first row; an empty one may be."""
    with open_file(path) as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return not line or "left_out" in json.loads(line)["metadata"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def format_answers(answers: Answers) -> Iterator[str]:
    """The summary that the command prints."""
    ledger = answers.ledger
    data, samples = ledger["data"], ledger["samples"]
    asked = samples["questions"]
    yield f"{'rows':<10}{data['rows']:,} read, {data['used']:,} usable" + (
        f", {ledger['drawn']:,} drawn" if ledger["drawn"] is not None else ""
    )
    refusals = _refusals(data)
    for reason, count in refusals[:_SHOWN]:
        yield f"{'refused':<10}{count:,}: {reason}"
    if more := sum(count for _, count in refusals[_SHOWN:]):
        yield f"{'refused':<10}{more:,}: other reasons, in the ledger"
    yield f"{'samples':<10}{samples['samples']:,} of {asked:,} prompts: {samples['kept']:,} kept"
    for reason, left_out in samples["left_out"].items():
        yield f"{'left out':<10}{left_out['count']:,}: {reason} ({', '.join(left_out['samples'][:2])})"
    if without := asked - samples["answered"]:
        yield f"{'note':<10}{without:,} {'prompt has' if without == 1 else 'prompts have'} no answer in the file"
    yield f"{'tokens':<10}{samples['tokens']:,} generated, {samples['kept_tokens']:,} kept"


def _refusals(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Reasons and numbers of rows, the most frequent first."""
    counts: dict[str, int] = {}
    for file in data["files"].values():
        for reason, rows in file["refused"].items():
            counts[reason] = counts.get(reason, 0) + len(rows)
    return sorted(counts.items(), key=lambda item: -item[1])
