"""The processes of one start find each other in a store where earlier starts have left their keys.

torchrun keeps one store for all its starts (--max-restarts), and the number of a start differs between hosts: each
counts its own failures. So process 0 makes up a name for this start, and gives it to whoever shows signs of life.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

_POLL_S = 0.05


class NotMetError(Exception):
    """Some processes have not come in time."""


def meet(store: Any, rank: int, size: int, limit_s: float) -> str:
    """A name that only the processes of this start know.

    Args:
        store: the launcher's.

    Raises:
        NotMetError: it names the processes that have not come.
    """
    end = time.monotonic() + limit_s
    if rank:
        return _come(store, rank, end)
    name, waiting, welcomed = uuid.uuid4().hex[:12], set(range(1, size)), set[bytes]()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"hello/{other}"]) and (word := store.get(f"hello/{other}")) not in welcomed:
                store.set(f"welcome/{word.decode()}", name)  # the word may be that of an earlier start: nobody answers
                welcomed.add(word)
            if store.check([f"here/{name}/{other}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > end:
            shown = ", ".join(map(str, sorted(waiting)[:8])) + (" and others" if len(waiting) > 8 else "")
            raise NotMetError(
                f"process{'es' if len(waiting) > 1 else ''} {shown} did not come in {limit_s:.0f} seconds"
            )
        time.sleep(_POLL_S if waiting else 0)
    return name


def _come(store: Any, rank: int, end: float) -> str:
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    while not store.check([f"welcome/{word}"]):
        if time.monotonic() > end:
            raise NotMetError("process 0 did not come in time")
        time.sleep(_POLL_S)
    name: str = store.get(f"welcome/{word}").decode()
    store.set(f"here/{name}/{rank}", "1")
    return name
