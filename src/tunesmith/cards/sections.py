"""Sections of a model card: what it was trained on, how it went, and its licence.

They hold counts, names of files and codes of refusals. They quote no row, and no folder of this machine.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.cards.licence import Licence
from tunesmith.data.ledger import FileLedger, Ledger
from tunesmith.display import to_markdown

DATA, RESULTS, TRAINING, LICENCE = "Training data", "Results", "Training", "Licence"
_SHOWN_FILES = 30
_HUB_DATA = re.compile(r"(?P<id>[\w.-]+/[\w.-]+):[\w.+-]+(\[[\d%:-]*\])?")  # as the ledger names it
_NO_CODE = "other"  # in ledgers of earlier versions
# keys of metrics.jsonl: name, format, and which value is the best
_SCORES = {
    "loss": ("training loss", ".4f", None),
    "eval_loss": ("evaluation loss", ".4f", min),
    "eval_perplexity": ("evaluation perplexity", ".2f", min),
    "eval_token_accuracy": ("evaluation token accuracy", ".1%", max),
}


def name_data(name: str, folder: Path | None = None) -> str:
    """A file of the ledger without its folders; the name of a hub data set unchanged.

    Args:
        folder: to which relative names refer.
    """
    return name if find_hub_data(name, folder) else os.path.basename(name.rstrip("/\\").replace("\\", "/"))


def find_hub_data(name: str, folder: Path | None = None) -> str:
    """The hub id of a data set in the ledger; "" for a file or folder."""
    found = _HUB_DATA.fullmatch(name)
    if not found:
        return ""
    return "" if ((folder or Path()) / found["id"]).parent.is_dir() else found["id"]


def hub_datasets(ledger: Ledger, folder: Path | None = None) -> list[str]:
    return sorted({found for name in ledger.files if (found := find_hub_data(name, folder))})


def data_section(train: Ledger, held_out: Ledger | None = None, folder: Path | None = None) -> str:
    """The ledger's counts, file by file.

    Args:
        held_out: of data.eval.
        folder: to which relative names refer.
    """
    share = train.target_tokens / max(1, train.tokens)
    lines = [*_table(train, folder), ""]
    lines.append(f"{train.tokens:,} tokens in {train.num_samples:,} samples, {share:.1%} of them supervised.")
    lines += _refusals(train)
    if held_out is not None:
        lines += ["", "Held out for evaluation:", "", *_table(held_out, folder), *_refusals(held_out)]
    return f"## {DATA}\n\n" + "\n".join(lines) + "\n"


def _table(ledger: Ledger, folder: Path | None) -> list[str]:
    lines = ["| file | rows | used | refused | truncated | split |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    entries = list(ledger.files.items())
    for name, entry in entries[:_SHOWN_FILES]:
        lines.append(_row(to_markdown(name_data(name, folder)), entry))
    if len(entries) > 1:
        total = [ledger.rows, ledger.used, ledger.refused, ledger.truncated, ledger.split]
        more = f" (also those of {len(entries) - _SHOWN_FILES:,} more)" if len(entries) > _SHOWN_FILES else ""
        lines.append(f"| all {len(entries):,} files{more} | " + " | ".join(f"{count:,}" for count in total) + " |")
    return lines


def _row(name: str, entry: FileLedger) -> str:
    counts = (entry.rows, entry.used, entry.rows - entry.used, len(entry.truncated), len(entry.split))
    return f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |"


def _refusals(ledger: Ledger) -> list[str]:
    """Refused rows by the code of their reason: the reason itself may quote a row."""
    counts: Counter[str] = Counter()
    for entry in ledger.files.values():
        for reason, rows in entry.refused.items():
            counts[ledger.codes.get(reason) or _NO_CODE] += len(rows)
    shown = ", ".join(f"{count:,} {code}" for code, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))
    return ["", f"Rows refused, by reason: {shown}."] if counts else []


def results_section(records: Sequence[Mapping[str, Any]]) -> str:
    """First, last and best values of what metrics.jsonl holds; "" without a logged step."""
    lines = []
    for key, (name, form, choose) in _SCORES.items():
        points = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
        if not points:
            continue
        cells = [_point(points[0], form), _point(points[-1], form)]
        cells.append(_point(choose(points, key=lambda one: one[1]), form) if choose else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = "| | first | last | best |\n| --- | ---: | ---: | ---: |\n"
    return f"## {RESULTS}\n\n{head}" + "\n".join(lines) + "\n"


def _point(point: tuple[int, float], form: str) -> str:
    return f"{point[1]:{form}} (step {point[0]:,})"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def licence_section(licence: Licence | None, base: str, of_base: bool = True) -> str:
    """The licence of the base; that it is unknown is said.

    Args:
        base: "" where there is none: the weights began as random numbers.
        of_base: whether the licence is the one that the base states, not another that was given.
    """
    if licence is not None:
        stated = f", as its base {base} states" if base and of_base else ""
        link = f" ({to_markdown(licence.link)})" if licence.link else ""
        text = f"{to_markdown(licence.shown)}{link}{stated}."
    elif base:
        text = f"Unknown: the licence of the base, {base}, was not found in its files. It also applies to this model."
    else:
        text = "None stated."
    return f"## {LICENCE}\n\n{text}\n"


def _heading(name: str) -> re.Pattern[str]:
    return re.compile(rf"^##[ \t]+{re.escape(name)}[ \t]*$", re.MULTILINE)


_ANY_HEADING = re.compile(r"^#{1,2}[ \t]", re.MULTILINE)


def has_section(body: str, name: str) -> bool:
    return _heading(name).search(body) is not None


def section_text(body: str, name: str) -> str:
    """Text of a section, without its heading; "" where there is none."""
    found = _heading(name).search(body)
    if found is None:
        return ""
    rest = body[found.end() :]
    following = _ANY_HEADING.search(rest)
    return rest[: following.start() if following else len(rest)].strip()


def put_section(body: str, name: str, section: str) -> str:
    """Replace a section, or add it at the end.

    Args:
        section: with its heading.
    """
    found = _heading(name).search(body)
    if found is None:
        return f"{body.rstrip()}\n\n{section}"
    rest = body[found.end() :]
    following = _ANY_HEADING.search(rest)
    behind = rest[following.start() :] if following else ""
    return body[: found.start()] + section + (f"\n{behind}" if behind else "")
