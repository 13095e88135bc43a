"""What all requests of a server share."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tunesmith.errors import ModelError
from tunesmith.generation.reply_parts import ReplyFormat, reply_format
from tunesmith.generation.speaker import Speaker
from tunesmith.generation.token_texts import TokenTexts
from tunesmith.serve.constraint import Grammars
from tunesmith.serve.errors import ApiError, from_model_error
from tunesmith.serve.settings import ServeSettings
from tunesmith.serve.worker import Worker

Result = TypeVar("Result")
_MAX_LOGPROBS = 1_000_000  # of an answer; each takes some 100 bytes
_MAX_FORMATS = 64  # of replies, by template variables
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Numbers for Prometheus; none of them is about a single request."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("tunesmith_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "tunesmith_request_seconds", "From a request to the end of its answer.", ["path"],
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.first_token = Histogram(
            "tunesmith_first_token_seconds", "From a request to its first token.", registry=registry, buckets=_SECONDS
        )
        self.prompt_tokens = Counter("tunesmith_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("tunesmith_generated_tokens", "Tokens generated.", registry=registry)
        for name, text, read in (
            ("running", "Replies being generated.", lambda worker: worker.num_running),
            ("waiting", "Replies that wait for a free row.", lambda worker: worker.num_waiting),
            ("open", "Replies that are not yet sent in full.", lambda worker: worker.num_open),
        ):
            gauge = Gauge(f"tunesmith_rows_{name}", text, registry=registry)
            gauge.set_function(partial(_sum_of, read, workers))
        for worker in workers:
            worker.on_first_token = self.first_token.observe


def _sum_of(read: Callable[[Worker], int], workers: Sequence[Worker]) -> int:
    return sum(map(read, workers))


@dataclass(frozen=True, eq=False)
class Serving:
    """What all requests of a model and its adapters share, as `request.app.state.serving`.

    Attributes:
        models: name in requests -> the adapter to use ("base": none; None: the model has no adapters).
        base: another model in the same process, with a worker of its own: the base of a full run (--base).
        created: when the server started, in seconds since 1970.
    """

    speaker: Speaker
    worker: Worker
    settings: ServeSettings
    models: dict[str, str | None]
    metrics: Metrics
    base: Serving | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _beside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))
    _formats: dict[str, ReplyFormat] = field(default_factory=dict)

    async def aside(self, work: Callable[[], Result]) -> Result:
        """The result of work that takes a while, such as encoding a prompt, done in the one thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self._beside, work)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.speaker.encoder)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.speaker)

    def reply_format(self, variables: Mapping[str, Any]) -> ReplyFormat:
        """How the template writes replies under these variables."""
        key = json.dumps(variables, sort_keys=True)
        if key not in self._formats:
            while len(self._formats) >= _MAX_FORMATS:
                self._formats.pop(next(iter(self._formats)))
            self._formats[key] = reply_format(self.speaker.encoder, variables)
        return self._formats[key]

    def require_room(self, num_tokens: int, param: str) -> None:
        """Raises:
        ApiError: no reply fits after a prompt of this length.
        """
        try:
            self.speaker.room_for_reply(num_tokens, 1)
        except ModelError as error:
            raise from_model_error(error, param) from None

    def require_few_logprobs(self, num_replies: int, num_tokens: int, num_logprobs: int | None, param: str) -> None:
        """Raises:
        ApiError: an answer with so many log-probabilities would take too much memory.
        """
        longest = min(num_tokens, self.speaker.context or num_tokens)
        if num_logprobs is not None and num_replies * longest * (num_logprobs + 1) > _MAX_LOGPROBS:
            raise ApiError(
                400, f"{param}: an answer may have {_MAX_LOGPROBS:,} log-probabilities; this one could have "
                f"{num_replies:,} replies x {longest:,} tokens x {num_logprobs + 1}. Ask for fewer.",
                code="too-many-logprobs", param=param,
            )  # fmt: skip

    @property
    def parts(self) -> list[Serving]:
        """This one, and that of the base."""
        return [self, self.base] if self.base else [self]

    @property
    def workers(self) -> list[Worker]:
        return [part.worker for part in self.parts]

    def of(self, model: str) -> Serving:
        """The part that has a model name of a request.

        Raises:
            ApiError: 404, there is no such model.
        """
        for part in self.parts:
            if model in part.models:
                return part
        known = ", ".join(name for part in self.parts for name in part.models)
        raise ApiError(
            404, f"model {model[:200]!r} does not exist here; there are: {known}.", code="model-not-found",
            param="model",
        )  # fmt: skip
