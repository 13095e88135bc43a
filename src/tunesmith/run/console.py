"""What a person sees of a run: the summary before step 1, the bar or plain lines during it."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from tunesmith.display import LEVEL_STYLES, cover_streams, one_line, raw_stream, visible

_PLAIN_LINES = 20  # lines of a run whose output goes to a file


class Reporter(Protocol):
    """Shows a run while it trains."""

    def summary(self, lines: list[tuple[str, str]]) -> None:
        """Names and texts, before step 1; an empty name continues the line before."""

    def note(self, text: str) -> None:
        """One remark."""

    def begin(self, total_steps: int, first_step: int) -> None:
        """Training starts after `first_step`."""

    def step(self, record: dict[str, Any], remark: str) -> None:
        """A record of metrics.jsonl; `remark` says what could not be saved, until a save succeeds."""

    def end(self) -> None:
        """Training ended, or failed."""


class ConsoleReporter:
    """Prints to standard output: what the commands use."""

    def __init__(self) -> None:
        self._display: StepDisplay | None = None

    def summary(self, lines: list[tuple[str, str]]) -> None:
        print_summary(lines)

    def note(self, text: str) -> None:
        print(text)

    def begin(self, total_steps: int, first_step: int) -> None:
        self._display = StepDisplay(total_steps, first_step)

    def step(self, record: dict[str, Any], remark: str) -> None:
        assert self._display is not None
        self._display.show(record, remark)

    def end(self) -> None:
        if self._display:
            self._display.close()


class Silent:
    """Shows nothing."""

    def summary(self, lines: list[tuple[str, str]]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def begin(self, total_steps: int, first_step: int) -> None:
        pass

    def step(self, record: dict[str, Any], remark: str) -> None:
        pass

    def end(self) -> None:
        pass


def print_summary(lines: list[tuple[str, str]]) -> None:
    """Name and text in two columns; an empty name continues the line above. Warnings and errors are coloured."""
    width = max(len(name) for name, _ in lines)
    console = Console(file=raw_stream(sys.stdout), soft_wrap=True, highlight=False, markup=False)
    for name, text in lines:
        console.print(Text(f"{name:<{width}}  {one_line(text)}", style=LEVEL_STYLES.get(name, "")))
    sys.stdout.flush()


class StepDisplay:
    """A rich progress bar on a terminal, else about twenty plain lines over the run.

    Args:
        first_step: where a resumed run begins.
    """

    def __init__(self, total_steps: int, first_step: int = 0) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self.started = time.perf_counter()
        self._next_line = first_step + 1
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                TimeRemainingColumn(),
                console=Console(file=raw_stream(sys.stdout)),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, line="")
            self._bar.start()
            cover_streams()  # rich has put streams of its own in their place

    def show(self, record: dict[str, Any], remark: str = "") -> None:
        """A record as a line, with `remark` at its end."""
        line = visible("  ".join(part for part in (format_record(record), remark) if part))
        step = record["step"]
        if self._bar:
            # numbers of an evaluation are printed above the bar; beside it they would push it off a narrow terminal
            short = visible("  ".join(part for part in (format_record(record, is_short=True), remark) if part))
            fields: dict[str, Any] = {"line": short} if short else {}
            self._bar.update(self._task, completed=step, **fields)
            if "eval_loss" in record or "rows" in record:
                self._bar.console.print(f"step {step}: {line}", highlight=False, markup=False)
        elif step >= self._next_line or step == self.total_steps or remark or {"eval_loss", "rows"} & set(record):
            self._next_line = step + max(1, self.total_steps // _PLAIN_LINES)
            print(f"step {step}/{self.total_steps}  {line}{self._time_left(step)}", flush=True)

    def _time_left(self, step: int) -> str:
        if step <= self.first_step:
            return ""
        seconds = (time.perf_counter() - self.started) / (step - self.first_step) * (self.total_steps - step)
        return f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left" if step < self.total_steps else ""

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def format_record(record: dict[str, Any], is_short: bool = False) -> str:
    """A record in words; `is_short` leaves out evaluations and rows."""
    parts = []
    if "loss" in record:
        parts += [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:.0f} tokens/s"]
    if is_short:
        return "  ".join(parts)
    if "eval_loss" in record:
        parts += [
            f"eval_loss {record['eval_loss']:.4f}",
            f"perplexity {record['eval_perplexity']:.2f}",
            f"accuracy {record['eval_token_accuracy']:.1%}",
        ]
    if "rows" in record:
        shown = ", ".join(record["rows"][:4]) + (" ..." if len(record["rows"]) > 4 else "")
        times = record.get("grad_norm_jump")
        what = f"gradient norm {times} times the usual" if times else "left out, its loss is not finite"
        parts.append(f"{what}: rows {shown}")
    return "  ".join(parts)
