"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, and the handlers that answer with them."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from tunesmith.display import shorten
from tunesmith.errors import TunesmithError

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


_CODES = {"context-full": "context_length_exceeded"}  # names that OpenAI's clients know


class ApiError(Exception):
    """An error that a request gets as its answer.

    Args:
        status: of HTTP.
        message: what is wrong and what to do; never about the server's files or other requests.
        param: the field of the request that is wrong.
        code: cause; shown with underscores, as OpenAI's are.
        retry_after_s: when the client may ask again.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {
            "message": shorten(self.message),
            "type": kind,
            "param": self.param,
            "code": self.code.replace("-", "_"),
        }
        return {"error": error}

    def response(self) -> Response:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def from_model_error(error: TunesmithError, param: str | None = None) -> ApiError:
    """The answer to a request that the model cannot answer; the messages of these errors name no files."""
    return ApiError(400, str(error), code=_CODES.get(error.code, error.code) or "model-error", param=param)


def queue_full() -> ApiError:
    text = "the server is busy: its queue is full. Ask again later."
    return ApiError(429, text, code="queue-full", retry_after_s=1)


def internal_error() -> ApiError:
    return ApiError(500, "the server has failed at this request; its log says more.", code="internal-error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(TunesmithError)
    async def _model(request: Request, error: TunesmithError) -> Response:
        return from_model_error(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        codes = {404: ("not-found", "no such path"), 405: ("method-not-allowed", "method not allowed here")}
        code, text = codes.get(error.status_code, ("http-error", "the request cannot be answered"))
        answer = ApiError(error.status_code, f"{text}: {request.method} {request.url.path}", code=code).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{param}: {first['msg']}", code="invalid-value", param=param or None).response()

    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> Response:
        return internal_error().response()


def log_unexpected(error: BaseException) -> None:
    """Write an unexpected error with its traceback to standard error."""
    logger.error(
        "unexpected error, please report it as a bug:\n%s", "".join(traceback.format_exception(error)).rstrip()
    )
