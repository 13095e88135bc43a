"""Deliver replies: whole, or as a stream of events; a client that leaves frees its rows."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from tunesmith.serve.errors import ApiError, internal_error, log_unexpected
from tunesmith.serve.worker import Piece, Replies

Result = TypeVar("Result")
Read = Callable[[Piece], Iterable[dict[str, Any]]]
"""Chunks of a stream for a piece of a reply."""
_SLACK_S = 5.0  # to send what is ready when the time is over
_GONE = 499  # nobody reads this status
_DONE = b"data: [DONE]\n\n"
_PART_BYTES = 1 << 16
ABORT = "abort"
"""Key of the connection's state: a function that cuts it off."""


class _Left(Exception):
    """The client has closed its connection."""


async def send_whole(
    request: Request, replies: Replies, read: Read, finish: Callable[[], dict[str, Any]], timeout_s: float
) -> Response:
    """Read all pieces, then answer with what `finish` makes of them.

    Raises:
        ApiError: a reply has failed, or takes too long.
    """

    async def collect() -> None:
        async for piece in replies:
            if piece.error is not None:
                raise piece.error
            for _ in read(piece):
                pass

    is_done = False
    try:
        async with asyncio.timeout(timeout_s):
            await _unless_left(request.receive, collect())
        answer = _WholeReply(JSONResponse(finish()), replies, timeout_s)
        is_done = True
    except TimeoutError:
        raise _too_slow(timeout_s) from None
    except _Left:
        return Response(status_code=_GONE)
    finally:
        if not is_done:
            replies.close()
    return answer


class _WholeReply(Response):
    """An answer that keeps its places in the queue until it is sent, and its client from keeping them for ever."""

    def __init__(self, answer: JSONResponse, replies: Replies, timeout_s: float) -> None:
        self._answer, self._replies, self._timeout_s = answer, replies, timeout_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                head = {"type": "http.response.start", "status": 200, "headers": self._answer.raw_headers}
                await send(head)
                body = memoryview(self._answer.body)
                for start in range(0, len(body), _PART_BYTES):
                    end = start + _PART_BYTES
                    await send(_body(bytes(body[start:end]), more=end < len(body)))
        except TimeoutError:
            await _abort(scope)
        finally:
            self._replies.close()


class EventStream(Response):
    """A response of server-sent events, one for each chunk.

    Args:
        begin: chunks before the first piece.
        end: chunks after the last one.
    """

    def __init__(
        self,
        replies: Replies,
        begin: Iterable[dict[str, Any]],
        read: Read,
        end: Callable[[], Iterable[dict[str, Any]]],
        timeout_s: float,
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._replies, self._begin, self._read, self._end, self._timeout_s = replies, begin, read, end, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(_Left):
                async with asyncio.timeout(self._timeout_s + _SLACK_S):
                    await _unless_left(receive, self._send_all(send))
        except TimeoutError:
            await _abort(scope)
        finally:
            self._replies.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send(_body(b"".join(map(_event, self._begin)), more=True))
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async for pieces in self._replies.batches(deadline):
                chunks = [chunk for piece in pieces for chunk in self._chunks(piece)]
                if chunks:
                    await send(_body(b"".join(map(_event, chunks)), more=True))
            last = b"".join([*map(_event, self._end()), _DONE])
        except ApiError as error:
            last = _event(error.body)
        except TimeoutError:
            last = _event(_too_slow(self._timeout_s).body)
        except Exception as error:  # the status is sent already
            log_unexpected(error)
            last = _event(internal_error().body)
        await send(_body(last, more=False))

    def _chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.error is not None:
            raise piece.error
        return self._read(piece)


async def _abort(scope: Scope) -> None:
    """Cut off a client that does not read; closing would wait until it does."""
    abort = scope.get("state", {}).get(ABORT)
    if abort is not None:
        abort()
        await asyncio.sleep(0)  # the server learns of it before it asks for the rest of the answer


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        _Left: it has.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_wait_until_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _too_slow(timeout_s: float) -> ApiError:
    text = f"the reply took longer than this server's limit of {timeout_s:g} seconds. Ask for fewer tokens."
    return ApiError(504, text, code="timeout")
