"""The progress bar of a run: one line that fits the terminal, at any width."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment

from tunesmith.display import cover_streams, format_time
from tunesmith.terminal.tty import no_echo

MARGIN = 5  # columns left free at the right: a line that wraps is drawn anew below itself
SHORTEST, LONGEST = 8, 60  # columns of the bar
REFRESHES = 2  # a second


class StepBar:
    """Drawn below everything that is printed, until `close`.

    Args:
        first_step: where a resumed run begins.
        console: on the terminal itself.
    """

    def __init__(self, total_steps: int, first_step: int, console: Console) -> None:
        self._total, self._first, self._console = total_steps, first_step, console
        self._began = self._updated = time.monotonic()
        self._step, self._parts, self._doing = first_step, [f"{first_step}/{total_steps}"], ""
        self._stack = ExitStack()
        self._stack.enter_context(no_echo())  # Enter would leave a copy of the bar behind
        self._live = Live(self, console=console, refresh_per_second=REFRESHES)
        try:
            self._live.start(refresh=True)
            cover_streams()  # rich has put streams of its own in their place
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def update(self, step: int, parts: Sequence[str]) -> None:
        """Args:
        parts: what to say beside the bar; the last ones are left out where the terminal is narrow.
        """
        self._step, self._updated, self._doing = step, time.monotonic(), ""
        self._parts = [f"{step}/{self._total}", *parts]

    def tell(self, doing: str) -> None:
        """Args:
        doing: what is done between two steps, in place of the last numbers until `update`.
        """
        self._doing = doing
        self._live.refresh()

    def print(self, lines: Sequence[str]) -> None:
        """Lines above the bar."""
        self._console.print("\n".join(lines), highlight=False, markup=False)

    def close(self) -> None:
        """The bar stays as it is now."""
        self._live.stop()
        self._stack.close()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - MARGIN)
        parts = [self._parts[0], self._time(), *([self._doing] if self._doing else self._parts[1:])]
        while len(parts) > 3 and len("  ".join(parts)) + SHORTEST + 1 > width:
            parts.pop()
        while len(parts) > 1 and len("  ".join(parts)) > width:  # too narrow for a bar
            parts.pop()
        text = "  ".join([parts[0], *parts[2:], *parts[1:2]])[:width]
        if (room := min(LONGEST, width - len(text) - 1)) >= SHORTEST:
            yield ProgressBar(total=self._total, completed=self._step, width=room)
            text = f" {text}"
        yield Segment(text)

    def _time(self) -> str:
        """Left, by the speed so far; before the first numbers, since the start."""
        now, done = time.monotonic(), self._step - self._first
        if done <= 0 or self._step >= self._total:
            return format_time((now if self._step < self._total else self._updated) - self._began)
        left = (self._updated - self._began) / done * (self._total - self._step) - (now - self._updated)
        return f"{format_time(left)} left"


def fold(parts: Sequence[str], width: int) -> list[str]:
    """Parts in lines of at most `width` columns; lines after the first are indented."""
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
            continue
        pieces = textwrap.wrap(part, max(8, width - 2))
        lines += [f"  {piece}" for piece in pieces]
    lines = lines[1:]
    return [lines[0].lstrip(), *lines[1:]] if lines else []
