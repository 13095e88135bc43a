"""The server's application: its routes, and what they share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response

from tunesmith.generation.speaker import Speaker
from tunesmith.serve.access import HostCheck, require_key
from tunesmith.serve.engine import Batcher
from tunesmith.serve.errors import ApiError, add_error_handlers
from tunesmith.serve.page import add_page
from tunesmith.serve.runs import ServedRun
from tunesmith.serve.settings import ServeSettings
from tunesmith.serve.worker import Worker

_STOP_S = 5.0


@dataclass(frozen=True, eq=False)
class Serving:
    """What all requests share, as `request.app.state.serving`.

    Attributes:
        models: name in requests -> the adapter to use ("base": none; None: the model has no adapters).
        created: when the server started, in seconds since 1970.
    """

    speaker: Speaker
    worker: Worker
    settings: ServeSettings
    models: dict[str, str | None]
    created: int = field(default_factory=lambda: int(time.time()))

    def adapter_of(self, model: str) -> str | None:
        """The adapter of a model name in a request.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"model {model[:200]!r} does not exist here; there are: {known}.", code="model-not-found",
                param="model",
            )  # fmt: skip
        return self.models[model]


def create_app(speaker: Speaker, name: str, settings: ServeSettings, runs: Sequence[ServedRun] = ()) -> FastAPI:
    """The application that answers for a model and its adapters.

    Args:
        name: of the model in requests; the adapters' own names are used if there are any.
        runs: that the page shows.
    """
    adapters = [*speaker.adapter_names, "base"] if speaker.adapter_names else []
    models: dict[str, str | None] = {one: one for one in adapters} or {name: None}
    worker = Worker(lambda: Batcher(speaker, max_rows=settings.max_rows), settings.max_rows, settings.max_queue)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()
            worker.join(_STOP_S)

    # FastAPI's own pages for documentation load scripts from other hosts; its telemetry sends requests to others
    silent: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None, telemetry=silent)
    app.state.serving = Serving(speaker, worker, settings, models)
    add_error_handlers(app)
    app.include_router(_open)
    app.include_router(_models, dependencies=[Depends(require_key)])
    add_page(app, runs)
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts)
    return app


_open = APIRouter()
_models = APIRouter()


@_open.get("/health")
async def health() -> Response:
    return JSONResponse({"status": "ok"})


@_models.get("/v1/models")
async def list_models(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    return JSONResponse({"object": "list", "data": [_describe(serving, name) for name in serving.models]})


@_models.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    serving: Serving = request.app.state.serving
    serving.adapter_of(name)
    return JSONResponse(_describe(serving, name))


def _describe(serving: Serving, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "tunesmith",
        "max_model_len": serving.speaker.context,
    }
