"""Who may use the server, and what a request brings: its key, the name it calls the server by, and its JSON body."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
from typing import Any, NoReturn

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.rows.conversation import find_lone_surrogate
from tunesmith.serve.errors import ApiError
from tunesmith.serve.settings import ServeSettings
from tunesmith.sources.jsontext import load_json

_BODY_TIMEOUT_S = 60.0
_MAX_DEPTH = 64  # of nested arrays and objects; schemas of tools are the deepest


async def require_key(request: Request) -> None:
    """FastAPI dependency: refuse a request without the server's key, if it has one.

    Raises:
        ApiError: 401.
    """
    settings: ServeSettings = request.app.state.serving.settings
    if settings.api_key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # bytes, since compare_digest takes ASCII text only; both comparisons always run
    is_right = hmac.compare_digest(given.strip().encode(), settings.api_key.encode())
    if not is_right or kind.lower() != "bearer":
        text = "no API key was given" if not given.strip() else "the API key is wrong"
        raise ApiError(401, f"{text}. Send the header Authorization: Bearer KEY.", code="invalid-api-key")


class HostCheck:
    """Refuse requests that call the server by another name.

    A page of another site can point its own name to 127.0.0.1 (DNS rebinding) and then read what a local server
    answers; its requests still carry that name.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and host_name(Headers(scope=scope).get("host", "")) not in self._allowed:
            names = ", ".join(sorted(self._allowed))
            error = ApiError(
                403, f"this server answers to {names} only. Use one of these names.", code="host-not-allowed"
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def host_name(host: str) -> str:
    """The name in a Host header, in lower case and without its port: localhost:8000 -> localhost."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].removesuffix(".")


async def read_body(request: Request) -> bytes:
    """The body of a request, to be parsed by `parse_object`.

    Raises:
        ApiError: it is too large, too slow, or not said to be JSON.
    """
    settings: ServeSettings = request.app.state.serving.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # a page of another site can send other types without asking the browser for permission first
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415, "the body must be JSON with the header Content-Type: application/json.", code="content-type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed.", code="content-encoding")
    return await _read_bytes(request, settings.max_body_bytes)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. A large one takes a while, and far more memory than its bytes.

    Raises:
        ApiError: it is not JSON, or not an object.
    """
    value = _parse(body)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object.", code="invalid-json")
    return value


async def _read_bytes(request: Request, limit: int) -> bytes:
    if (said := request.headers.get("content-length", "0")).isdecimal() and int(said[:20]) > limit:
        _refuse_size(limit)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    _refuse_size(limit)
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time.", code="body-timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body was complete.", code="body-incomplete") from None
    return b"".join(pieces)


def _refuse_size(limit: int) -> NoReturn:
    raise ApiError(413, f"the body is larger than this server's limit of {limit:,} bytes.", code="body-too-large")


def _parse(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (at byte {error.start:,}).", code="not-utf-8") from None
    try:
        value = load_json(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {error.msg} ({where}).", code="invalid-json") from None
    _require_depth(value)
    _require_texts(value)
    return value


def _require_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            below
            for item in level
            if isinstance(item, (dict, list))
            for below in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested more than {_MAX_DEPTH} levels deep.", code="invalid-json")


def _require_texts(value: Any) -> None:
    """Refuse half characters and numbers that JSON does not have (NaN, 1e999)."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and (half := find_lone_surrogate(item)):
            raise ApiError(400, f"the body has the lone surrogate {half!a}, half a character.", code="lone-surrogate")
        if isinstance(item, float) and not math.isfinite(item):
            raise ApiError(400, f"the body has the number {item}, which JSON does not allow.", code="invalid-json")
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
