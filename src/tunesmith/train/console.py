"""What a person sees of a run: the summary before step 1, the bar or plain lines during it."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINES = 20  # lines of a run whose output goes to a file


def format_count(number: float) -> str:
    """1234567 -> "1.2M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def format_bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def print_summary(lines: list[tuple[str, str]]) -> None:
    """Name and text in two columns; an empty name goes on under the line before."""
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    sys.stdout.flush()


class StepDisplay:
    """A rich progress bar on a terminal, else about twenty plain lines over the run."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.started = time.perf_counter()
        self._next_line = 1
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("", total=total_steps, line="")
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        line = format_record(record)
        step = record["step"]
        if self._bar:
            self._bar.update(self._task, completed=step, line=line)
            if "eval_loss" in record:
                self._bar.console.print(f"step {step}: {line}", highlight=False)
        elif step >= self._next_line or step == self.total_steps or "eval_loss" in record:
            self._next_line = step + max(1, self.total_steps // _PLAIN_LINES)
            print(f"step {step}/{self.total_steps}  {line}{self._time_left(step)}", flush=True)

    def _time_left(self, step: int) -> str:
        if step == 0:
            return ""
        seconds = (time.perf_counter() - self.started) / step * (self.total_steps - step)
        return f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left" if step < self.total_steps else ""

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def format_record(record: dict[str, Any]) -> str:
    parts = []
    if "loss" in record:
        parts += [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:.0f} tokens/s"]
    if "eval_loss" in record:
        parts += [
            f"eval_loss {record['eval_loss']:.4f}",
            f"perplexity {record['eval_perplexity']:.2f}",
            f"accuracy {record['eval_token_accuracy']:.1%}",
        ]
    return "  ".join(parts)
