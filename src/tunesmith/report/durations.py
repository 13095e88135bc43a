"""How long a run took, by phase, from the clocks in its metrics."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.report.records import Record, RunRecords

_LONGEST_PREPARATION_S = 86_400.0  # beyond that, the clock was set or the folder was moved


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of each phase; None where the metrics do not tell.

    Attributes:
        preparation: reading and labelling the data, loading and checking the model, up to the first step.
        training: forward, backward and optimizer.
        evaluation: on the held-out data.
        rest: between the first record and the last: checkpoints, and pauses of a run that was resumed.
        tokens_per_s: of training, over the whole run.
    """

    preparation: float | None = None
    training: float | None = None
    evaluation: float | None = None
    rest: float | None = None
    tokens_per_s: float | None = None

    @property
    def total(self) -> float | None:
        known = [self.preparation, self.training, self.evaluation, self.rest]
        return sum(seconds for seconds in known if seconds is not None) if self.training is not None else None


def measure_durations(run: RunRecords) -> Durations:
    """Phases of the run, from `tokens_per_s`, `eval_s` and `time` of its records."""
    records = run.records
    tokens, training = _training_of(records)
    evaluation = sum(record.get("eval_s") or 0.0 for record in records)
    clocks = [record["time"] for record in records if record.get("time") is not None]
    if not training or len(clocks) != len(records):  # a run of an earlier version has no clock in its records
        return Durations(training=training or None, tokens_per_s=tokens / training if training else None)
    before_first = _training_of(records[:1])[1] + (records[0].get("eval_s") or 0.0)
    rest = max(0.0, clocks[-1] - clocks[0] - (training + evaluation - before_first))
    began = _timestamp(run.run.get("date"))
    preparation = clocks[0] - before_first - began if began is not None else None
    if preparation is not None and not 0 <= preparation <= _LONGEST_PREPARATION_S:
        preparation = None
    has_eval = any("eval_loss" in record for record in records)
    return Durations(preparation, training, evaluation if has_eval else None, rest, tokens / training)


def _training_of(records: Sequence[Record]) -> tuple[int, float]:
    """Tokens and seconds of training: each record has the speed since the one before."""
    before, counted, seconds = 0, 0, 0.0
    for record in records:
        tokens, speed = record.get("tokens"), record.get("tokens_per_s")
        if tokens is None or not speed or tokens <= before:
            continue
        counted += int(tokens - before)
        seconds += (tokens - before) / speed
        before = tokens
    return counted, seconds


def _timestamp(date: object) -> float | None:
    try:
        return datetime.datetime.fromisoformat(str(date)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def format_duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second} s" if second else f"{minutes} min"
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minute} min" if minute else f"{hours} h"
    days, hour = divmod(hours, 24)
    return f"{days} d {hour} h" if hour else f"{days} d"
