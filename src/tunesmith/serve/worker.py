"""The thread that generates: it owns the batcher, takes requests from the server's event loop and sends tokens back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from tunesmith.errors import TunesmithError
from tunesmith.generation.batcher import Batcher, Token
from tunesmith.generation.request import Request
from tunesmith.serve.errors import ApiError, from_model_error, internal_error, log_unexpected, queue_full

_PAUSE_S = 1


@dataclass(eq=False)
class _Row:
    """One choice of a response.

    Attributes:
        number: what the batcher calls it; None while it waits.
    """

    replies: Replies
    index: int
    request: Request
    number: int | None = None
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of one choice, or the error that ended it."""

    index: int
    token: Token | None
    error: ApiError | None = None


@dataclass(eq=False)
class Replies:
    """The choices of one response as they are generated; used from the event loop."""

    _worker: Worker
    _rows: list[_Row] = field(default_factory=list)
    _pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    _ended: set[int] = field(default_factory=set)
    _is_closed: bool = False
    _opened: float = field(default_factory=time.monotonic)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Tokens of all choices as they come, until each has ended."""
        while len(self._ended) < len(self._rows):
            for piece in self._admit(await self._pieces.get()):
                yield piece

    async def batches(self, deadline: float) -> AsyncIterator[list[Piece]]:
        """As iteration, but what has come since the last time in one list.

        Raises:
            TimeoutError: there is more to come at this time of the event loop.
        """
        while len(self._ended) < len(self._rows):
            async with asyncio.timeout_at(deadline):
                pieces = self._admit(await self._pieces.get())
            while not self._pieces.empty():
                pieces += self._admit(self._pieces.get_nowait())
            yield pieces

    def _admit(self, piece: Piece) -> list[Piece]:
        """A piece of a choice that has not ended."""
        if piece.index in self._ended:
            return []
        if self._opened:
            self._worker.on_first_token(time.monotonic() - self._opened)
            self._opened = 0
        if piece.token is None or piece.token.finish_reason is not None:
            self._ended.add(piece.index)
        return [piece]

    def put(self, piece: Piece) -> None:
        if not self._is_closed:
            self._pieces.put_nowait(piece)

    def cancel(self, index: int) -> None:
        """End one choice; its row is free for others."""
        self._ended.add(index)
        self._worker.cancel([self._rows[index]])

    def close(self) -> None:
        """End all choices and give their places in the queue to others; to be called in any case."""
        if not self._is_closed:
            self._is_closed = True
            self._worker.release(self._rows)


class Worker:
    """Generates the replies of all requests in a thread of its own.

    Args:
        make_batcher: makes another one after an unexpected error.
        max_rows: rows that run at once.
        max_queue: further rows that may wait.
    """

    def __init__(self, batcher: Batcher, make_batcher: Callable[[], Batcher], max_rows: int, max_queue: int) -> None:
        self._first, self._make_batcher = [batcher], make_batcher
        self._max_rows, self._limit = max_rows, max_rows + max_queue
        self._lock = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._cancelled: list[_Row] = []
        self._running: dict[int, _Row] = {}
        self.on_first_token: Callable[[float], None] = lambda seconds: None
        self.num_open = 0  # rows whose response is not yet sent in full; of the event loop
        self.num_cut = 0  # rows that `stop` has ended
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    # -- the event loop --

    def start(self) -> None:
        """Called in the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End all replies with an error, and the thread after its current step."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether replies are generated."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def open(self, requests: Sequence[Request]) -> Replies:
        """Queue the choices of one response.

        Raises:
            ApiError: 429, the queue is full; 503, the server is stopping.
        """
        if self._is_stopping:
            raise _stopping()
        self.require_places(len(requests))
        if self.num_open + len(requests) > self._limit:
            raise queue_full()
        self.num_open += len(requests)
        replies = Replies(self)
        replies._rows += [_Row(replies, index, request) for index, request in enumerate(requests)]
        with self._lock:
            self._waiting.extend(replies._rows)
            self._lock.notify()
        return replies

    def require_places(self, num_replies: int) -> None:
        """Raises:
        ApiError: not even the empty server takes so many at once.
        """
        if num_replies > self._limit:
            text = f"the request asks for {num_replies:,} replies; this server takes at most {self._limit:,} at once."
            raise ApiError(400, text, code="too-many-replies", param="n")

    def cancel(self, rows: Sequence[_Row]) -> None:
        with self._lock:
            self._cancelled += [row for row in rows if not row.is_over]
            self._lock.notify()

    def release(self, rows: Sequence[_Row]) -> None:
        """Forget the rows of a response that was sent, or whose client has left."""
        self.num_open -= len(rows)
        self.cancel(rows)

    # -- the thread --

    def _work(self) -> None:
        batcher = self._first.pop()
        while True:
            with self._lock:
                while not (self._waiting or self._cancelled or batcher.has_work or self._is_stopping):
                    self._lock.wait()
                cancelled, self._cancelled = self._cancelled, []
                if self._is_stopping:
                    break
            pieces: list[tuple[_Row, Piece]] = []
            try:
                self._turn(batcher, cancelled, pieces)
            except Exception as error:  # a bug, or memory is full: these rows are lost, the server is not
                log_unexpected(error)
                pieces += [self._end(row, internal_error()) for row in [*self._running.values()]]
                del error
                self._send(pieces)
                with self._lock:  # some may not have been freed
                    self._cancelled += [row for row in cancelled if not row.is_over]
                del batcher  # its caches make room for those of the next one
                batcher = self._renew()
            else:
                self._send(pieces)
        left = [row for row in [*self._running.values(), *self._waiting] if row not in cancelled]
        self.num_cut = len(left)
        self._send([self._end(row, _stopping()) for row in left])

    def _renew(self) -> Batcher:
        """Another batcher, as soon as one can be made; until then all replies fail."""
        while True:
            try:
                return self._make_batcher()
            except Exception as error:
                log_unexpected(error)
                with self._lock:
                    waiting, self._waiting = [*self._waiting], deque()
                    is_stopping = self._is_stopping
                self._send([self._end(row, internal_error()) for row in waiting])
                if is_stopping:
                    raise
                time.sleep(_PAUSE_S)

    def _turn(self, batcher: Batcher, cancelled: Sequence[_Row], pieces: list[tuple[_Row, Piece]]) -> None:
        """Free the rows of clients that have left, start waiting ones, and generate one token of each.

        Args:
            pieces: takes what is to be sent, also before an error.
        """
        for row in cancelled:
            if row.is_over:
                continue
            row.is_over = True
            if row.number is None:
                with self._lock:
                    self._waiting.remove(row)
            elif self._running.pop(row.number, None) is not None:
                batcher.cancel(row.number)
        while self._waiting and len(self._running) < self._max_rows:
            with self._lock:
                row = self._waiting.popleft()
            try:
                row.number = batcher.submit(row.request)
                self._running[row.number] = row
            except TunesmithError as error:
                pieces.append(self._end(row, from_model_error(error)))
            except Exception as error:
                log_unexpected(error)
                pieces.append(self._end(row, internal_error()))
        if batcher.has_work:
            pieces += [self._piece(token) for token in batcher.step() if token.row in self._running]

    def _piece(self, token: Token) -> tuple[_Row, Piece]:
        row = self._running[token.row]
        if token.finish_reason is None:
            return row, Piece(row.index, token)
        if token.finish_reason == "error":
            return self._end(row, from_model_error(token.error) if token.error else internal_error())
        row.is_over = True
        del self._running[token.row]
        return row, Piece(row.index, token)

    def _end(self, row: _Row, error: ApiError) -> tuple[_Row, Piece]:
        row.is_over = True
        if row.number is not None:
            self._running.pop(row.number, None)
        return row, Piece(row.index, None, error)

    def _send(self, pieces: Sequence[tuple[_Row, Piece]]) -> None:
        if pieces and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, pieces)


def _deliver(pieces: Sequence[tuple[_Row, Piece]]) -> None:
    for row, piece in pieces:
        row.replies.put(piece)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping. Ask again later.", code="stopping", retry_after_s=5)
