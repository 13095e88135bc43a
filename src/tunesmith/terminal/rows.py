"""How far the preparation of data is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment

from tunesmith.display import cover_streams, format_time, raw_stream
from tunesmith.terminal.bar import LONGEST, MARGIN, REFRESHES, SHORTEST
from tunesmith.terminal.tty import no_echo

_SILENT_S = 1.5  # short preparations show nothing
_LINE_S = 30.0  # between two plain lines


class RowDisplay:
    """Shown from its first `update` after _SILENT_S until `close`."""

    def __init__(self) -> None:
        self._began = self._next_line = time.monotonic()
        self._first: tuple[int, float | None, float] | None = None  # rows, share and time of the first update
        self._rows, self._now = 0, self._began
        self._share: float | None = None
        self._stack = ExitStack()
        self._live: Live | None = None
        self._next_line += _LINE_S / 3

    def update(self, rows: int, share: float | None) -> None:
        """Args:
        rows: that are labelled.
        share: of the data's bytes that has been read.
        """
        self._rows, self._share, self._now = rows, share, time.monotonic()
        if self._first is None:  # a preparation that is continued begins with many rows
            self._first = rows, share, self._now
        if self._now - self._began < _SILENT_S:
            return
        if self._live is None and sys.stdout is not None and sys.stdout.isatty():
            console = Console(file=raw_stream(sys.stdout))
            if not console.is_dumb_terminal:
                self._start(console)
        if self._live is None and self._now >= self._next_line:
            self._next_line = self._now + _LINE_S
            print("preparing the data:  " + "  ".join(self.parts()), flush=True)

    def _start(self, console: Console) -> None:
        self._stack.enter_context(no_echo())
        self._live = Live(self, console=console, refresh_per_second=REFRESHES, transient=True)
        try:
            self._live.start(refresh=True)
            cover_streams()  # rich has put streams of its own in their place
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._stack.close()

    def parts(self) -> list[str]:
        """Rows, share, speed and time left."""
        parts = [f"{self._rows:,} rows"]
        if self._share is not None:
            parts.append(f"{min(1.0, self._share):.0%}")
        if self._first is not None and (seconds := self._now - self._first[2]) > 0:
            rows, share, _ = self._first
            parts.append(f"{(self._rows - rows) / seconds:,.0f} rows/s")
            if share is not None and self._share is not None and share < self._share < 1:
                parts.append(f"{format_time((1 - self._share) / (self._share - share) * seconds)} left")
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - MARGIN)
        parts = self.parts()
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)[:width]
        room = min(LONGEST, width - len(text) - 1)
        if self._share is not None and room >= SHORTEST:
            yield ProgressBar(total=1.0, completed=min(1.0, self._share), width=room)
            text = f" {text}"
        yield Segment(text)
