"""The Python caller's process: one run at a time, silent libraries, and everything global as it was afterwards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("tunesmith")
_OWNED = threading.RLock()  # by the thread that may change what is global


@contextmanager
def one_run() -> Iterator[None]:
    """Wait for a run in another thread: both would draw from the same random generators, and neither be repeatable."""
    if not _OWNED.acquire(blocking=False):
        logger.info("waiting for the end of a run in another thread")
        _OWNED.acquire()
    try:
        yield
    finally:
        _OWNED.release()


@contextmanager
def embedded() -> Iterator[None]:
    """Libraries print nothing, and the process is as it was afterwards: random states, threads, progress bars."""
    if not _OWNED.acquire(blocking=False):  # a run in another thread has done this already
        yield
        return
    try:
        with _silent_libraries():
            from tunesmith.training.randomness import unchanged_process

            with unchanged_process():
                yield
    finally:
        _OWNED.release()


@contextmanager
def _silent_libraries() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    others = {name: logging.getLogger(name) for name in ("bitsandbytes", "huggingface_hub")}
    levels = {name: other.level for name, other in others.items()}
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    has_data_bars = not datasets.utils.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for other in others.values():
        other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
        if has_data_bars:
            datasets.enable_progress_bars()
        for name, other in others.items():
            other.setLevel(levels[name])
