"""Memory that this process may still take: of the machine, of its control groups, of a GPU."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS, _MEMORY = Path("/proc/self/cgroup"), Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free.

    Attributes:
        swap: beside them; infinite where a driver or the system moves memory out by itself, as far as it likes.
        what: whose memory it is, for messages.
    """

    free: float
    swap: float
    what: str


def find_room(device: torch.device) -> Room:
    if device.type != "cuda":
        return Room(free_memory(), free_swap(), "this machine has")
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    moves = sys.platform == "win32" or "microsoft" in platform.release().lower()  # its driver moves tensors to the host
    return Room(float(free + unused), float("inf") if moves else 0.0, "the GPU has")


def total_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")


def free_memory() -> float:
    """Bytes that this process may still take, of the machine and of its control groups."""
    found = [total_memory()]
    with contextlib.suppress(OSError, KeyError, ValueError):
        found.append(1024.0 * _numbers(_MEMORY)["MemAvailable:"])
    return max(0.0, min([*found, *(limit for limit, _ in _group_limits())]))


def free_swap() -> float:
    """Bytes of swap that this process may take; infinite where the system does not say (macOS makes it as needed)."""
    try:
        free = 1024.0 * _numbers(_MEMORY)["SwapFree:"]
    except (OSError, KeyError, ValueError):
        return float("inf")
    return max(0.0, min([free, *(swap for _, swap in _group_limits())]))


_NAMES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # cgroup 2 and 1
_FILES = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def _group_limits() -> Iterator[tuple[float, float]]:
    """Free memory and free swap of each control group with a limit that this process is in."""
    for folder in _group_folders():
        for names in _NAMES:
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                stat = _numbers(folder / "memory.stat")
                files = max(sum(stat.get(name, 0) for name in pair) for pair in (_FILES[:2], _FILES[2:]))
                yield float(limit - used + min(files, used)), _group_swap(folder)  # cached files make room


def _group_folders() -> Iterator[Path]:
    """Of this process, and all above them; in a container, its own is the root."""
    lines = []
    with contextlib.suppress(OSError):
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    seen = set()
    for line in [*lines, "0::/", "0:memory:/"]:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = _GROUPS / kinds
        own = root / path.lstrip("/")
        for folder in [own, *own.parents]:
            if folder.is_relative_to(root) and folder not in seen:
                seen.add(folder)
                yield folder


def _group_swap(folder: Path) -> float:
    try:
        limit, used = (
            int((folder / name).read_text(encoding="ascii")) for name in ("memory.swap.max", "memory.swap.current")
        )
    except (OSError, ValueError):  # no limit of its own
        return float("inf")
    return float(max(0, limit - used))


def _numbers(path: Path) -> dict[str, int]:
    """First word -> second word of each line."""
    words = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1}
