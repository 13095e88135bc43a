"""Who may use the server: the key of a request, and the name that it calls the server by."""

from __future__ import annotations

import hmac

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.serve.errors import ApiError
from tunesmith.serve.settings import ServeSettings


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
