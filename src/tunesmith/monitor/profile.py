"""train.profile_steps: what some steps spend their time on, by torch's profiler."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from tunesmith.display import one_line

logger = logging.getLogger(__name__)
_OPERATIONS = 8  # that the table names


class Profile:
    """Records the steps of a range, and writes one trace of them for each process.

    Args:
        steps: first and last step.
        folder: RUN/profile.
        rank: of this process; the first one also prints a table.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, rank: int) -> None:
        self._first, self._last = steps
        self._folder, self._rank = folder, rank
        self._began = 0  # first recorded step
        self._profiler: Any = None
        self._has_failed = False

    def before(self, step: int) -> None:
        """Step `step` begins."""
        if self._profiler is not None or self._has_failed or not self._first <= step <= self._last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler: Any = torch.profiler.profile(activities=activities)
        try:
            profiler.start()
        except RuntimeError as error:  # another profiler runs in this process
            self._has_failed = True
            logger.warning("warning: train.profile_steps: nothing is recorded: %s", one_line(str(error)))
            return
        self._profiler, self._began = profiler, step

    def after(self, step: int) -> None:
        """Step `step` is done."""
        if self._profiler is not None and step >= self._last:
            self._write(step)

    def end(self, step: int, is_urgent: bool) -> None:
        """The run ends after `step`, perhaps within the range.

        Args:
            is_urgent: there is no time to write.
        """
        if self._profiler is None:
            return
        if step >= self._began and not is_urgent:
            self._write(step)
        else:
            with contextlib.suppress(Exception):
                self._profiler.stop()
            self._profiler = None

    def _write(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        steps = f"{self._began}-{last}" if last > self._began else f"{last}"
        path = self._folder / f"steps-{steps}.process-{self._rank}.json.gz"
        partial = path.with_name(f".{path.name}")  # torch compresses by the name's end
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            with contextlib.suppress(OSError):
                partial.unlink()
            logger.warning("warning: the profile of steps %s could not be written: %s", steps, one_line(str(error)))
            return
        if self._rank == 0:
            for line in describe(profiler.key_averages(), steps, path):
                logger.info("%s", line)


def describe(operations: Any, steps: str, path: Path) -> list[str]:
    """A short table: the operations that took the most time, without what they called."""
    has_device = any(operation.self_device_time_total > 0 for operation in operations)

    def own(operation: Any) -> float:
        return float(operation.self_device_time_total if has_device else operation.self_cpu_time_total)

    most = sorted((operation for operation in operations if own(operation) > 0), key=own, reverse=True)
    total = sum(map(own, most)) or 1.0
    where = "GPU" if has_device else "CPU"
    noun = "steps" if "-" in steps else "step"
    lines = [
        f"profile of {noun} {steps}: {path} (open it in https://ui.perfetto.dev)",
        f"  {where} time  share  calls  operation",
    ]
    for operation in most[:_OPERATIONS]:
        lines.append(
            f"  {own(operation) / 1e3:>5.0f} ms  {own(operation) / total:>5.0%}  {operation.count:>5}  "
            f"{one_line(str(operation.key))[:60]}"
        )
    return lines
