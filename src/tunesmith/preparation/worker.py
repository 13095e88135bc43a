"""A worker process of pool.py: receives a setup and then items, and sends back what its function makes of each."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from tunesmith.errors import TunesmithError

_LOOK_S = 5.0


def serve(number: int) -> None:
    """Work until the other end of the connection closes.

    Args:
        number: file descriptor of the connection.
    """
    connection = Connection(number)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, items), daemon=True).start()
    setup, function = items.get(), None
    while True:
        item = items.get()
        try:
            if function is None:
                function = setup.open()
                gc.freeze()  # no search for garbage in what the libraries hold
            outcome = function(item)
        except BaseException as error:  # the parent raises it
            if not isinstance(error, TunesmithError):
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            outcome = error
        _send(connection, outcome)


def _listen(connection: Connection, items: queue.SimpleQueue[Any]) -> None:
    """Pass on what arrives; ends the process with its parent, also in the middle of an item."""
    parent = os.getppid()
    while True:
        try:
            while not connection.poll(_LOOK_S):
                if os.getppid() != parent:  # and something that it started holds the connection open
                    os._exit(0)
            items.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _send(connection: Connection, outcome: Any) -> None:
    try:
        data = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
        if isinstance(outcome, BaseException):
            pickle.loads(data)  # some cannot be built again
    except Exception:
        if not isinstance(outcome, BaseException):
            raise
        data = pickle.dumps(RuntimeError(f"{type(outcome).__name__}: {outcome}"))
    try:
        connection.send_bytes(data)
    except OSError:  # the parent has gone
        os._exit(0)
