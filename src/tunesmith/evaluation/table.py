"""An evaluation on the terminal: its progress, and its scores in a table of 80 columns."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from tunesmith.display import format_time, one_line, raw_stream, visible
from tunesmith.evaluation.records import SCORES, Difference, Evaluation, ModelResult, Score
from tunesmith.terminal.bar import StepBar

WIDTH = 80
_PLAIN_LINES = 20  # of each part, where the output is not a terminal
_LABEL, _VALUE, _DIFFERENCE = 21, 19, 21
_GROUPS = {"likelihood": "likelihood", "text": "replies beside the references", "form": "form of the replies",
           "json": "replies that should be JSON", "tools": "tool calls", "judge": "judge"}  # fmt: skip
_SHOWN_REFUSALS, _SHOWN_ROWS = 5, 3


class Progress:
    """Shows one part after another (a model's likelihood, its replies): a bar on a terminal, else about twenty lines.

    Written to standard error, so that --json leaves standard output to the scores.
    """

    def __init__(self, is_shown: bool = True) -> None:
        self._is_shown = is_shown
        self._bar: StepBar | None = None
        self._title, self._first, self._next, self._began = "", 0, 0, 0.0

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.end()
        self._title, self._first, self._next, self._began = title, done, done + 1, time.monotonic()
        if not self._is_shown:
            return
        if sys.stderr.isatty() and not (console := Console(file=raw_stream(sys.stderr))).is_dumb_terminal:
            self._bar = StepBar(total, done, console)
            self._bar.update(done, [one_line(title)])

    def update(self, done: int, total: int, *parts: str) -> None:
        """Args:
        parts: more to say, such as the speed.
        """
        if not self._is_shown:
            return
        if self._bar:
            self._bar.update(done, [one_line(self._title), *parts])
        elif done >= self._next or done == total:
            self._next = done + max(1, total // _PLAIN_LINES)
            left = ""
            if self._first < done < total:
                seconds = (time.monotonic() - self._began) / (done - self._first) * (total - done)
                left = f"  {format_time(seconds)} left"
            print("  ".join([f"{self._title}  {done:,}/{total:,}{left}", *parts]), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if not self._is_shown:
            return
        if self._bar:
            self._bar.print([visible(text)])
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None


def format_evaluation(evaluation: Evaluation, width: int | None = None) -> list[str]:
    """The data, the scores of each model with half the width of their intervals, and the differences.

    Args:
        width: of the table; default: of the terminal, at most 80 columns.
    """
    if width is None:
        width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    lines = list(_data_lines(evaluation))
    for model in evaluation.models:
        lines += [f"note      {model.name}: {remark}" for remark in model.remarks]
    is_one_block = len(evaluation.models) == 2 and width >= WIDTH
    for models in [evaluation.models] if is_one_block else _split(evaluation.models, width):
        lines += ["", *_block(models, evaluation.differences if is_one_block else [])]
    for difference in [] if is_one_block else evaluation.differences:
        lines += ["", *_difference_block(difference)]
    lines += ["", "± is half the width of the 95 % interval,", "< and > its limit; over rows."]
    if evaluation.differences:
        lines.append("* marks a difference that is not 0 by it.")
    return [one_line(line).rstrip() for line in lines]


def _data_lines(evaluation: Evaluation) -> Iterator[str]:
    data = evaluation.data
    for place, source in enumerate(data.sources[:3]):
        yield f"{'' if place else 'data':<10}{source}"
    if len(data.sources) > 3:
        yield f"{'':<10}and {len(data.sources) - 3:,} more"
    left_out, is_drawn = data.labelled - data.usable, data.scored < data.usable or data.labelled < data.rows
    parts = [f"{data.rows:,} read", f"{data.scored:,} {'drawn and ' if is_drawn else ''}scored"]
    parts += [f"{left_out:,} left out"] if left_out else []
    yield f"{'rows':<10}{', '.join(parts)}"
    for refusal in data.refused[:_SHOWN_REFUSALS]:
        rows = ", ".join(refusal.rows[:_SHOWN_ROWS]) + (", ..." if refusal.count > _SHOWN_ROWS else "")
        yield f"{'refused':<10}{refusal.count:,}: {refusal.reason} ({rows})"
    if data.replies:
        yield f"{'replies':<10}{data.replies:,} of each model"


def _split(models: Sequence[ModelResult], width: int) -> Iterator[Sequence[ModelResult]]:
    """As many models beside each other as there is room for."""
    at_once = max(1, (width - _LABEL) // _VALUE)
    for start in range(0, len(models), at_once):
        yield models[start : start + at_once]


def _block(models: Sequence[ModelResult], pairs: Sequence[Difference]) -> Iterator[str]:
    """Scores of models beside each other, and their differences."""
    heads = [_right(model.name, _VALUE) for model in models] + [_right("difference", _DIFFERENCE) for _ in pairs]
    yield " " * _LABEL + "".join(heads)
    names = [name for name in SCORES if any(name in model.scores for model in models)]
    for group, members in groupby(names, key=lambda name: SCORES[name].group):
        yield _GROUPS[group]
        for name in members:
            cells = [_right(_show_score(name, model.scores.get(name)), _VALUE) for model in models]
            cells += [_right(_show_difference(name, pair.scores.get(name)), _DIFFERENCE) for pair in pairs]
            yield _left(f"  {SCORES[name].label}", _LABEL) + "".join(cells)


def _difference_block(difference: Difference) -> Iterator[str]:
    yield f"{difference.model} minus {difference.reference}"
    for name in SCORES:
        if name in difference.scores:
            shown = _show_difference(name, difference.scores[name])
            yield _left(f"  {SCORES[name].label}", _LABEL) + _right(shown, _DIFFERENCE)


def _show_score(name: str, score: Score | None) -> str:
    if score is None or score.value is None:
        return f"-{'':<9}"
    kind = SCORES[name]
    shown = kind.show(score.value)
    if score.low is None or score.high is None:
        return f"{shown}{'':<9}"
    if kind.shown == "share" and score.value in (0.0, 1.0):
        limit = f"<{kind.show(score.high)}" if score.value == 0 else f">{kind.show(score.low)}"
        return f"{shown} {limit:<8}"
    return f"{shown} ±{kind.show((score.high - score.low) / 2):<7}"


def _show_difference(name: str, score: Score | None) -> str:
    if score is None or score.value is None:
        return f"-{'':<11}"
    kind = SCORES[name]
    shown = kind.show(score.value, "+" if score.value else "")
    if score.low is None or score.high is None:
        return f"{shown}{'':<11}"
    mark = "*" if score.low > 0 or score.high < 0 else " "
    return f"{shown} ±{kind.show((score.high - score.low) / 2):<7} {mark}"


def _left(text: str, width: int) -> str:
    return set_cell_size(text, width) if cell_len(text) > width else text + " " * (width - cell_len(text))


def _right(text: str, width: int) -> str:
    text = one_line(text)
    if cell_len(text) > width - 1:
        text = f"{set_cell_size(text, width - 4).rstrip()}..."
    return " " * (width - cell_len(text)) + text
