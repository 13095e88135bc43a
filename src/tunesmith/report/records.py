"""Read what a run left in its folder, checked: metrics, config and ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed
from tunesmith.reading import read_text
from tunesmith.runfolder import RUN_FILE, RunFolder, latest_stage

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecords:
    """A run as its folder tells it.

    Attributes:
        records: of metrics.jsonl, in its order.
        damaged: numbers of the lines of metrics.jsonl that are not records.
        ledger: of data_ledger.json.
        run: of run.json; empty where it cannot be read.
    """

    folder: RunFolder
    config: RunConfig
    records: list[Record]
    damaged: list[int]
    ledger: Mapping[str, Any]
    run: Mapping[str, Any]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have a finite value of this name."""
        points = [(r["step"], float(r[name])) for r in self.records if r.get(name) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)


def read_run(path: Path) -> RunRecords:
    """Read the folder of a run, finished or not.

    Raises:
        TunesmithError: the folder is not a run, or a file in it is damaged.
    """
    folder = find_run(path)
    config = resolve_config(RunConfig, folder.config, {})
    records, damaged = read_metrics(folder.metrics)
    try:
        run = read_sealed(folder.record)
    except (OSError, ValueError, RecursionError):  # it only tells when the run began
        run = {}
    return RunRecords(folder, config, records, damaged, read_ledger(folder.ledger), run)


def find_run(path: Path) -> RunFolder:
    """The folder of a run, by the name that train was given.

    Raises:
        TunesmithError: there is no such folder, or it holds no run.
    """
    folder = RunFolder(latest_stage(path.expanduser()))
    if not folder.path.is_dir():
        what = "is a file, not a folder" if folder.path.exists() else "no such folder"
        raise TunesmithError(
            f"{path}: {what}. Give the RUN folder that tunesmith train had as --output.", code="run-not-found"
        )
    if not folder.is_run and not folder.config.is_file():
        raise TunesmithError(
            f"{path}: is not a run (it has no {RUN_FILE}). Give the RUN folder that tunesmith train had as --output.",
            code="not-a-run",
        )
    return folder


def read_metrics(path: Path) -> tuple[list[Record], list[int]]:
    """The records, and the numbers of lines that are not records. A kill may have cut the last line, which is left out.

    Raises:
        TunesmithError: the file cannot be read, or none of its lines is a record.
    """
    try:
        text = read_text(path, errors="replace")
    except FileNotFoundError:  # the run ended before its first step
        return [], []
    except OSError as error:
        raise TunesmithError(
            f"{path}: cannot be read: {error.strerror or error}. Its records are what the report is made of.",
            code="metrics-unreadable",
        ) from None
    lines = text.split("\n")
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged and not records:
        raise TunesmithError(
            f"{path}: is damaged: none of its {len(damaged):,} lines is a record of a step. Restore it from a backup, "
            "or remove it to make the report without its curves.",
            code="metrics-damaged",
        )
    return records, damaged


def parse_record(line: str) -> Record | None:
    """A JSON object with a step, whose other values are numbers where the report needs numbers."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_step(record.get("step")):
        return None
    for name in _NUMBERS:
        value = record.get(name)
        if value is not None and not _is_number(value):
            return None
        record[name] = None if value is None else _in_range(value)
    return {name: value for name, value in record.items() if value is not None}


_NUMBERS = (
    "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "router_loss", "eval_loss",
    "eval_perplexity", "eval_token_accuracy", "eval_exact_match", "eval_rougeL", "eval_stopped", "eval_s", "time",
    "skipped", "grad_norm_jump", "memory_gb",
)  # fmt: skip
_LARGEST_STEP = 10**12
_LARGEST = 1e100


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_STEP


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_range(value: float) -> float | None:
    """None for what is not finite or too large to be drawn; an int in JSON may have any length."""
    if isinstance(value, int):
        return value if abs(value) < _LARGEST else None
    if not math.isfinite(value) or abs(value) >= _LARGEST:
        return None
    return value if abs(value) > 1 / _LARGEST else 0.0


def read_ledger(path: Path) -> Mapping[str, Any]:
    """The content of data_ledger.json.

    Raises:
        TunesmithError: it is gone or damaged.
    """
    try:
        ledger = read_sealed(path)
        for name in ("train", "eval"):
            part = ledger[name]
            if part is None and name == "eval":
                continue
            for entry in part["files"].values():
                counts = entry["rows"], entry["used"], len(entry["truncated"])
                lists = entry["refused"].values(), entry["notes"].values()
                if not all(isinstance(count, int) for count in counts) or any(map(_has_no_list, lists)):
                    raise ValueError("a file's numbers are not as they should be")
    except OSError as error:
        raise TunesmithError(
            f"{path}: cannot be read: {error.strerror or error}. The report shows what became of each row.",
            code="ledger-unreadable",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TunesmithError(
            f"{path}: is damaged. Restore it from a backup; the report shows what became of each row.",
            code="ledger-damaged",
        ) from None
    return ledger


def _has_no_list(values: Any) -> bool:
    return any(not isinstance(value, list) for value in values)
