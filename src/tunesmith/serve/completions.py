"""/v1/completions: texts to continue, without a chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from tunesmith.generation.request import Request
from tunesmith.serve.access import parse_object, read_body
from tunesmith.serve.delivery import EventStream, send_whole
from tunesmith.serve.requests import CompletionFields, encode_prompts, list_prompts, read_completion
from tunesmith.serve.serving import Serving
from tunesmith.serve.worker import Piece

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: HttpRequest) -> Response:
    all_models: Serving = request.app.state.serving
    serving, fields, requests = await all_models.aside(partial(_prepare, all_models, await read_body(request)))
    reply = CompletionReply(serving, fields, requests)
    replies = serving.worker.open(requests)
    timeout_s = serving.settings.timeout_s
    if fields.stream:
        return EventStream(replies, reply.begin(), reply.read, reply.end, timeout_s)
    return await send_whole(request, replies, reply.read, reply.whole, timeout_s)


def _prepare(all_models: Serving, body: bytes) -> tuple[Serving, CompletionFields, list[Request]]:
    """The part that has the model, the fields without the prompts, and one request for each choice of each prompt."""
    fields = read_completion(parse_object(body))
    serving = all_models.of(fields.model)
    adapter = serving.models[fields.model]
    given = list_prompts(fields)
    num_replies = len(given) * fields.num_choices
    serving.worker.require_places(num_replies)
    serving.require_few_logprobs(num_replies, fields.max_new_tokens(serving.settings), fields.logprobs, "logprobs")
    prompts = encode_prompts(given, serving.speaker.encoder, serving.speaker.num_embeddings)
    for ids in prompts:
        serving.require_room(len(ids), "prompt")
    fields.prompt = None  # not kept while the reply is generated
    return (
        serving,
        fields,
        [
            Request(ids, sampling, fields.stops, fields.logprobs, adapter)
            for ids in prompts
            for sampling in fields.samplings(serving.settings)
        ],
    )


class CompletionReply:
    """The response to a completion request as its tokens come."""

    def __init__(self, serving: Serving, fields: CompletionFields, requests: Sequence[Request]) -> None:
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fields, self._serving = fields, serving
        self._prompts = [request.ids for request in requests[:: fields.num_choices]]
        echoed = [serving.texts.decode(ids) if fields.echo else "" for ids in self._prompts]
        self._begins = [echoed[at // fields.num_choices] for at in range(len(requests))]
        self._texts: list[list[str]] = [[begin] for begin in self._begins]
        self._lengths = [len(begin) for begin in self._begins]
        self._logprobs: list[list[tuple[str, float, dict[str, float], int]]] = [[] for _ in requests]
        self._reasons: list[str | None] = [None] * len(requests)
        self._num_tokens = 0
        serving.metrics.prompt_tokens.inc(sum(map(len, self._prompts)))

    def begin(self) -> Iterator[dict[str, Any]]:
        for index, text in enumerate(self._begins):
            if text:
                yield self._chunk(index, text, [])

    def read(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take a token in; the chunks that a stream sends for it."""
        token, index = piece.token, piece.index
        assert token is not None
        self._num_tokens += 1
        self._serving.metrics.tokens.inc()
        entries = []
        if token.logprob is not None and token.id not in self._serving.speaker.stop_ids:
            texts = self._serving.texts
            top = {texts.shown(one): value for one, value in token.top_logprobs}
            entries = [(texts.shown(token.id), token.logprob, top, self._lengths[index])]
        self._texts[index].append(token.text)
        self._lengths[index] += len(token.text)
        self._logprobs[index] += entries
        self._reasons[index] = token.finish_reason
        if token.text or entries or token.finish_reason:
            yield self._chunk(index, token.text, entries, token.finish_reason)

    def end(self) -> Iterable[dict[str, Any]]:
        if self._fields.wants_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [
            self._choice(index, "".join(texts), self._logprobs[index], self._reasons[index])
            for index, texts in enumerate(self._texts)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    def _chunk(self, index: int, text: str, entries: Sequence[Any], reason: str | None = None) -> dict[str, Any]:
        chunk = {**self._head(), "choices": [self._choice(index, text, entries, reason)]}
        return {**chunk, "usage": None} if self._fields.wants_usage else chunk

    def _choice(self, index: int, text: str, entries: Sequence[Any], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._fields.logprobs is not None:
            tokens, values, tops, offsets = zip(*entries, strict=True) if entries else ((), (), (), ())
            logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._fields.model}

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt + self._num_tokens,
        }
