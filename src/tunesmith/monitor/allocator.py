"""Keep the memory that a training step frees: glibc would give it back to the system and fetch it again each step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEEP_ALL = 2**31 - 1  # bytes; mallopt takes an int
_LARGEST_IN_HEAP = (2**30, 2**25)  # older versions of glibc refuse more than 32 MiB
_AFTERWARDS = (2**26, 2**25)  # trim and mmap threshold: the most that glibc adjusts them to by itself
_OF_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


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
    try:
        yield True
    finally:
        _set(mallopt, *_AFTERWARDS)
        ctypes.CDLL(None).malloc_trim(0)


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
