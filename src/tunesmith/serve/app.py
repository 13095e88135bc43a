"""The server's application: its routes, and what they share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.errors import UsageError
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.speaker import Speaker
from tunesmith.serve import chat, completions
from tunesmith.serve.access import HostCheck, require_key
from tunesmith.serve.errors import ApiError, add_error_handlers, queue_full
from tunesmith.serve.page import add_page
from tunesmith.serve.runs import ServedRun
from tunesmith.serve.serving import Metrics, Serving
from tunesmith.serve.settings import ServeSettings
from tunesmith.serve.worker import Worker

_STOP_S = 5.0
_BESIDES = 64  # bodies that are read while the queue is full


def create_app(
    speaker: Speaker,
    name: str,
    settings: ServeSettings,
    runs: Sequence[ServedRun] = (),
    alias: str | None = None,
    base: Speaker | None = None,
) -> FastAPI:
    """The application that answers for a model and its adapters.

    Args:
        name: of the model in requests; adapters have names of their own.
        runs: that the page shows.
        alias: another name of the first adapter, or the name of the model.
        base: another model, which answers as "base".

    Raises:
        UsageError: two models would have one name.
    """
    models: dict[str, str | None] = {one: one for one in [*speaker.adapter_names, "base"] if speaker.adapter_names}
    first = next(iter(models), None)
    if alias in models and alias != first:
        raise UsageError(f"--name {alias}: another model has this name here. Give another.", code="name-taken")
    models = {alias: first} | models if alias else models or {name: None}
    if base is not None and "base" in models:
        raise UsageError("--base: the model is named base too. Give it another with --name.", code="name-taken")
    speakers = [speaker, base] if base else [speaker]
    workers = [_build_worker(one, settings, len(speakers)) for one in speakers]
    metrics = Metrics(workers)
    other = Serving(base, workers[1], settings, {"base": None}, metrics) if base else None
    serving = Serving(speaker, workers[0], settings, models, metrics, other)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join(_STOP_S)

    # FastAPI's own pages for documentation load scripts from other hosts; its telemetry sends requests to others
    silent: Any = {"tracing": False, "metrics": False, "logs": False}
    # a redirect to a path without its last "/" names http, also behind a proxy that speaks https
    app = FastAPI(
        lifespan=life, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, telemetry=silent
    )
    app.state.serving = serving
    add_error_handlers(app)
    app.include_router(_open)
    for router in (_models, chat.router, completions.router):
        app.include_router(router, dependencies=[Depends(require_key)])
    add_page(app, runs)
    app.add_middleware(Measured, metrics=metrics, limit=settings.max_rows + settings.max_queue + _BESIDES)
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts)
    return app


def _build_worker(speaker: Speaker, settings: ServeSettings, num_sharing: int) -> Worker:
    def make_batcher() -> Batcher:
        return Batcher(speaker, max_rows=settings.max_rows, num_sharing=num_sharing)

    return Worker(make_batcher(), make_batcher, settings.max_rows, settings.max_queue)


class Measured:
    """Counts requests and their time, by path, and refuses too many bodies at once."""

    def __init__(self, app: ASGIApp, metrics: Metrics, limit: int) -> None:
        self._app, self._metrics, self._limit, self._num_bodies = app, metrics, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"
        status, start = "none", time.monotonic()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        has_body = scope["method"] == "POST"
        self._num_bodies += has_body
        try:
            await (queue_full().response() if self._num_bodies > self._limit else self._app)(scope, receive, watch)
        finally:
            self._num_bodies -= has_body
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - start)


_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")
_open = APIRouter()
_models = APIRouter()


@_open.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    if not all(worker.is_alive for worker in serving.workers):
        raise ApiError(503, "the server is stopping, or has failed; its log says more.", code="stopping")
    return JSONResponse({"status": "ok"})


@_models.get("/metrics")
async def metrics(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    return Response(generate_latest(serving.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@_models.get("/v1/models")
async def list_models(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    return JSONResponse(
        {"object": "list", "data": [_describe(part, name) for part in serving.parts for name in part.models]}
    )


@_models.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    serving: Serving = request.app.state.serving
    return JSONResponse(_describe(serving.of(name), name))


def _describe(serving: Serving, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "tunesmith",
        "max_model_len": serving.speaker.context,
    }
