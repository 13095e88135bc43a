"""The page at `/`: its files, and the endpoints under /ui/ that only it uses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from starlette.responses import JSONResponse, Response

from tunesmith.errors import TunesmithError
from tunesmith.serve.access import require_key
from tunesmith.serve.errors import ApiError
from tunesmith.serve.runs import ServedRun

logger = logging.getLogger(__name__)

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# nothing from elsewhere, no script or style inside the HTML, and no frame of another site around it
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, by its ETag
}
_DATA_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def add_page(app: FastAPI, runs: Sequence[ServedRun] = ()) -> None:
    """Serve the page, which anyone may load, and what it shows of runs, for those who have the server's key."""
    static = _read_files()
    named = {run.name: run for run in runs}

    @app.api_route("/", methods=["GET", "HEAD"])
    async def _page(request: Request) -> Response:
        return _answer(request, static["index.html"])

    @app.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def _static(request: Request, name: str) -> Response:
        if name not in static:
            raise ApiError(404, "there is no such file.", code="not-found")
        return _answer(request, static[name])

    @app.api_route("/favicon.ico", methods=["GET", "HEAD"])  # asked for beside any other answer, as of /health
    async def _icon(request: Request) -> Response:
        return _answer(request, static["icon.svg"])

    app.include_router(_run_routes(named), prefix="/ui", dependencies=[Depends(require_key)])


def _run_routes(named: dict[str, ServedRun]) -> APIRouter:
    router = APIRouter()

    def run_of(name: str) -> ServedRun:
        if name not in named:
            raise ApiError(404, "there is no such run here.", code="run-not-found")
        return named[name]

    # plain functions: they read files, which FastAPI then does in threads
    @router.get("/runs")
    def list_runs() -> Response:
        return _json({"runs": [{"name": run.name, "parts": run.parts} for run in named.values()]})

    @router.get("/runs/{name}")
    def show_run(name: str) -> Response:
        with _Reading(name):
            return _json(run_of(name).about())

    @router.get("/runs/{name}/metrics")
    def read_metrics(
        name: str, offset: int = Query(0, ge=0, lt=2**63), mark: str = Query("", max_length=16)
    ) -> Response:
        with _Reading(name):
            return _json(run_of(name).metrics(offset, mark))

    @router.get("/runs/{name}/rows")
    def read_rows(
        name: str,
        part: Literal["train", "eval"] = "train",
        kind: Literal["used", "refused"] = "used",
        start: int = Query(0, ge=0, lt=2**63),
    ) -> Response:
        with _Reading(name):
            return _json(run_of(name).rows(part, kind, start))

    return router


class _Reading:
    """Turns errors of a run's files into an answer that names no path; the log has the whole message."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (TunesmithError, OSError, ValueError, KeyError)):
            logger.warning("warning: the run %s cannot be shown: %s", self._name, error)
            raise ApiError(
                503, "the files of this run cannot be read now; the server's log says why.", code="run-unreadable"
            ) from None


def _read_files() -> dict[str, _File]:
    """The files of the folder static/, by name."""
    found = {}
    for file in files("tunesmith.serve").joinpath("static").iterdir():
        if (kind := file.name.rpartition(".")[2]) in _TYPES:
            content = file.read_bytes()
            found[file.name] = _File(content, _TYPES[kind], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def _answer(request: Request, file: _File) -> Response:
    headers = {**PAGE_HEADERS, "ETag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _json(value: Any) -> Response:
    return JSONResponse(value, headers=_DATA_HEADERS)
