"""What a person sees of a run: the summary before step 1, the bar or plain lines during it."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from tunesmith.display import LEVEL_STYLES, format_rows, format_time, one_line, raw_stream, visible
from tunesmith.terminal.bar import StepBar, fold
from tunesmith.terminal.rows import RowDisplay
from tunesmith.terminal.status import show_status

_PLAIN_LINES = 20  # lines of a run whose output goes to a file


class Reporter(Protocol):
    """Shows a run while it trains.

    Attributes:
        owns_process: a second Ctrl-C may end the process: nothing runs in it but this command.
    """

    owns_process: bool

    def stage(self, text: str) -> None:
        """What is being done now, until the next output."""

    def preparing(self, rows: int, share: float | None) -> None:
        """Rows that are labelled, and the share of the data's bytes that has been read, where it is known."""

    def prepared(self) -> None:
        """No more rows are labelled, or an error ended that."""

    def summary(self, lines: list[tuple[str, str]]) -> None:
        """Names and texts, before step 1; an empty name continues the line before."""

    def note(self, text: str) -> None:
        """One remark."""

    def begin(self, total_steps: int, first_step: int, total_epochs: float | None) -> None:
        """Training starts after `first_step`. A streamed run does not know its epochs."""

    def doing(self, text: str) -> None:
        """What is done between two steps, until the next record."""

    def step(self, record: dict[str, Any], remark: str) -> None:
        """A record of metrics.jsonl; `remark` says what could not be saved, until a save succeeds."""

    def end(self) -> None:
        """Training ended, or failed."""


class ConsoleReporter:
    """Prints to standard output: what the commands use."""

    owns_process = True

    def __init__(self) -> None:
        self._display: StepDisplay | None = None
        self._rows: RowDisplay | None = None

    def stage(self, text: str) -> None:
        show_status(text)

    def preparing(self, rows: int, share: float | None) -> None:
        self._rows = self._rows or RowDisplay()
        self._rows.update(rows, share)

    def prepared(self) -> None:
        if self._rows:
            self._rows.close()
            self._rows = None

    def summary(self, lines: list[tuple[str, str]]) -> None:
        print_summary(lines)

    def note(self, text: str) -> None:
        print(text)

    def begin(self, total_steps: int, first_step: int, total_epochs: float | None) -> None:
        self._display = StepDisplay(total_steps, first_step, total_epochs)

    def doing(self, text: str) -> None:
        if self._display is not None:
            self._display.tell(text)

    def step(self, record: dict[str, Any], remark: str) -> None:
        assert self._display is not None
        self._display.show(record, remark)

    def end(self) -> None:
        if self._display:
            self._display.close()
            self._display = None


class Silent:
    """Shows nothing. Of several processes, the first shows what they do."""

    def __init__(self, owns_process: bool = False) -> None:
        self.owns_process = owns_process

    def stage(self, text: str) -> None:
        pass

    def preparing(self, rows: int, share: float | None) -> None:
        pass

    def prepared(self) -> None:
        pass

    def summary(self, lines: list[tuple[str, str]]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def begin(self, total_steps: int, first_step: int, total_epochs: float | None) -> None:
        pass

    def doing(self, text: str) -> None:
        pass

    def step(self, record: dict[str, Any], remark: str) -> None:
        pass

    def end(self) -> None:
        pass


def print_summary(lines: list[tuple[str, str]]) -> None:
    """Name and text in two columns, folded on a terminal; a line with an empty name continues the one above.

    Warnings and errors are coloured on a terminal.
    """
    width = max(len(name) for name, _ in lines)
    room = max(20, shutil.get_terminal_size().columns - width - 2)
    console = Console(file=raw_stream(sys.stdout), soft_wrap=True, highlight=False, markup=False)
    for name, text in lines:
        shown = [one_line(text)]
        if sys.stdout.isatty():
            shown = textwrap.wrap(shown[0], room, break_long_words=False, break_on_hyphens=False) or shown
        for number, line in enumerate(shown):
            console.print(Text(f"{'' if number else name:<{width}}  {line}", style=LEVEL_STYLES.get(name, "")))
    sys.stdout.flush()


class StepDisplay:
    """A progress bar on a terminal that can move its cursor, else about twenty plain lines over the run.

    Args:
        first_step: where a resumed run begins.
        total_epochs: of the whole run; None if they are not known.
    """

    def __init__(self, total_steps: int, first_step: int = 0, total_epochs: float | None = 1.0) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self._epochs = "/" + f"{total_epochs:.2f}".rstrip("0").rstrip(".") if total_epochs is not None else ""
        self.started = time.perf_counter()
        self._next_line = first_step + 1
        self._remark = ""
        self._bar: StepBar | None = None
        self._console: Console | None = None
        if sys.stdout.isatty():
            self._console = Console(file=raw_stream(sys.stdout))
        if self._console and not self._console.is_dumb_terminal:  # such a one cannot draw a line again
            self._bar = StepBar(total_steps, first_step, self._console)

    def tell(self, doing: str) -> None:
        """What the bar says until the next record; plain lines have no place for it."""
        if self._bar:
            self._bar.tell(doing)

    def show(self, record: dict[str, Any], remark: str = "") -> None:
        """A record as a line, with `remark` at its end."""
        step = record["step"]
        epoch = f"epoch {record['epoch']:.2f}{self._epochs}"
        numbers, findings = format_numbers(record), format_findings(record)
        if self._bar and self._console:
            is_news = bool(remark) and remark != self._remark  # on a terminal, once is enough
            self._remark = remark
            self._bar.update(step, [*numbers[:1], epoch, *numbers[1:]])
            if findings or is_news:
                head = f"step {step}/{self.total_steps}"
                lines = fold([head, epoch, *numbers, *findings, *([remark] if is_news else [])], self._console.width)
                self._bar.print([visible(line) for line in lines])
        elif step >= self._next_line or step == self.total_steps or remark or findings:
            self._next_line = step + max(1, self.total_steps // _PLAIN_LINES)
            parts = [f"step {step}/{self.total_steps}", epoch, *numbers, *findings, remark, self._time_left(step)]
            print("  ".join(filter(None, parts)), flush=True)

    def _time_left(self, step: int) -> str:
        if not self.first_step < step < self.total_steps:
            return ""
        seconds = (time.perf_counter() - self.started) / (step - self.first_step) * (self.total_steps - step)
        return f"{format_time(seconds)} left"

    def close(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None


def format_numbers(record: dict[str, Any]) -> list[str]:
    """Numbers of training."""
    if "loss" not in record:
        return []
    return [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:.0f} tokens/s"]


def format_findings(record: dict[str, Any]) -> list[str]:
    """What is worth a line of its own: an evaluation, a jump of the gradient norm, a step that was left out."""
    parts = []
    if "eval_loss" in record:
        parts += [
            f"eval_loss {record['eval_loss']:.4f}",
            f"perplexity {record['eval_perplexity']:.2f}",
            f"accuracy {record['eval_token_accuracy']:.1%}",
        ]
    if "eval_exact_match" in record:
        parts += [f"exact match {record['eval_exact_match']:.0%}", f"stopped {record['eval_stopped']:.0%}"]
    if "rows" in record:
        times = record.get("grad_norm_jump")
        what = f"gradient norm {times:.0f} times the usual" if times else "left out, its loss is not finite"
        parts.append(f"{what}: {format_rows(record['rows'])}")
    return parts
