"""Memory and throughput of each process, for metrics.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.distributed.world import World
from tunesmith.monitor.memory import process_memory

_GB = 1e9
_MARKS = 1000


class Stopwatch:
    """Adds up the seconds between `start` and `stop`."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The sum of what is done, which begins anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class DeviceStopwatch(Stopwatch):
    """The same in the time of a GPU, which works behind the host; the host does not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        if len(self._marks) > _MARKS:  # the oldest belong to earlier steps, which are done
            done, self._marks = self._marks[:-1], self._marks[-1:]
            done[-1][1].synchronize()
            self._seconds += _sum(done)
        self._marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._marks[-1][0].record()

    def stop(self) -> None:
        self._marks[-1][1].record()

    def take(self) -> float:
        done = [mark for mark in self._marks if mark[1].query()]  # others belong to a step that is still computed
        self._marks = self._marks[len(done) :]
        return super().take() + _sum(done)


def _sum(marks: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    return sum(float(began.elapsed_time(ended)) for began, ended in marks) / 1000


def memory_gb(device: torch.device) -> float | None:
    """Peak memory of this process: on a GPU what tensors took since the last call, else all of the process since its
    start; None where the system does not say."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / _GB
    if own := process_memory()[1]:
        return own / _GB
    try:
        import resource
    except ImportError:  # Windows
        return None
    # on Linux this would begin with the peak of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _GB if sys.platform == "darwin" else peak * 1024 / _GB


def usage_record(world: World, memory: float | None, tokens_per_s: float) -> dict[str, Any]:
    """The keys of a record. All processes call this.

    Args:
        memory: of this process in GB; None: unknown.
        tokens_per_s: of this process alone, without its waiting for others.
    """
    if world.size == 1:
        return {} if memory is None else {"memory_gb": round(memory, 3)}
    own = torch.zeros(2, world.size, dtype=torch.float64)
    own[0, world.rank] = -1.0 if memory is None else memory
    own[1, world.rank] = tokens_per_s
    memories, speeds = world.sum(own).tolist()
    record: dict[str, Any] = {}
    if min(memories) >= 0:
        record = {"memory_gb": round(max(memories), 3), "process_memory_gb": [round(value, 3) for value in memories]}
    return record | {"process_tokens_per_s": [round(value, 1) for value in speeds]}
