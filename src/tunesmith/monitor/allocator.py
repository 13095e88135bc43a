"""Keep the memory that a training step frees: glibc would give it back to the system and fetch it again each step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEEP_ALL = 2**31 - 1  # bytes; mallopt takes an int
_LARGEST_IN_HEAP = (2**30, 2**25)  # older versions of glibc refuse more than 32 MiB
_AFTERWARDS = (2**26, 2**25)  # trim and mmap threshold: the most that glibc adjusts them to by itself
_MUCH = 2**30  # bytes: fetching them again takes little of a step that needs so many
_COUNTS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
_OF_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS]


class _Gaps:
    """Whether memory is kept now, by a glibc that leaves gaps."""

    are_left = False


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Within the block, glibc takes tensors from its heap and keeps what is freed; yields whether it does.

    By default it maps large tensors one by one, so that the system zeroes the same pages again in each step. Other
    allocators, and settings that the user has made, are left alone.
    """
    mallopt = _find_mallopt()
    if mallopt is None or not any(_set(mallopt, _KEEP_ALL, largest) for largest in _LARGEST_IN_HEAP):
        yield False
        return
    _Gaps.are_left = leaves_gaps()
    try:
        yield True
    finally:
        _Gaps.are_left = False
        _set(mallopt, *_AFTERWARDS)
        ctypes.CDLL(None).malloc_trim(0)


def glibc_version() -> tuple[int, int] | None:
    """None with another C library."""
    name = ""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    found = re.match(r"glibc (\d+)\.(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None


def leaves_gaps() -> bool:
    """Whether glibc is older than 2.38: no tensor of the same size fits where an aligned one was freed, so a step may
    take new memory beside what the step before it freed."""
    version = glibc_version()
    return version is not None and version < (2, 38)


def give_back_much() -> None:
    """After a step: give the system what was freed, if it is much and would be taken anew beside the gaps."""
    if not _Gaps.are_left:
        return
    library = ctypes.CDLL(None)
    try:
        library.mallinfo2.restype = _MallInfo
    except AttributeError:  # before 2.33
        return
    if library.mallinfo2().fordblks > _MUCH:
        library.malloc_trim(0)


def _find_mallopt() -> Callable[[int, int], int] | None:
    """glibc's function, if its allocator is in use and has its defaults."""
    variables = os.environ
    if any(name in variables for name in _OF_USERS) or "malloc" in variables.get("GLIBC_TUNABLES", ""):
        return None
    if "malloc" in variables.get("LD_PRELOAD", ""):  # jemalloc, tcmalloc
        return None
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (AttributeError, ValueError, OSError):  # Windows; another C library
        return None
    return found


def _set(mallopt: Callable[[int, int], int], trim: int, mmap: int) -> bool:
    return bool(mallopt(_MMAP_THRESHOLD, mmap) and mallopt(_TRIM_THRESHOLD, trim))
