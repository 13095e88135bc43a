"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from tunesmith.generation.reply_parts import Part, ReplyFormat, ReplyReader
from tunesmith.generation.request import Request
from tunesmith.generation.token_texts import TokenTexts
from tunesmith.serve.access import parse_object, read_body
from tunesmith.serve.delivery import EventStream, send_whole
from tunesmith.serve.errors import ApiError
from tunesmith.serve.requests import (
    ChatFields,
    encode_chat,
    read_chat,
    read_messages,
    read_variables,
    shape_of,
    tool_named,
)
from tunesmith.serve.serving import Serving
from tunesmith.serve.worker import Piece, Replies

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: HttpRequest) -> Response:
    all_models: Serving = request.app.state.serving
    serving, fields, asked = await all_models.aside(partial(_prepare, all_models, await read_body(request)))
    reply = ChatReply(serving, fields, asked)
    replies = reply.replies = serving.worker.open(asked.requests)
    timeout_s = serving.settings.timeout_s
    if fields.stream:
        return EventStream(replies, reply.begin(), reply.read, reply.end, timeout_s)
    return await send_whole(request, replies, reply.read, reply.whole, timeout_s)


@dataclass(frozen=True, slots=True)
class Asked:
    """A chat request, ready to be generated: one request for each choice."""

    requests: Sequence[Request]
    form: ReplyFormat
    tools: Sequence[dict[str, Any]]


def _prepare(all_models: Serving, body: bytes) -> tuple[Serving, ChatFields, Asked]:
    """The part that has the model, the fields of a request without the large ones, and what is to be generated.

    Raises:
        ApiError: the request cannot be answered.
    """
    fields = read_chat(parse_object(body))
    serving = all_models.of(fields.model)
    encoder, adapter = serving.speaker.encoder, serving.models[fields.model]
    serving.worker.require_places(fields.num_choices)
    num_tokens = fields.max_new_tokens(serving.settings)
    serving.require_few_logprobs(fields.num_choices, num_tokens, fields.num_logprobs, "top_logprobs")
    messages, tools = read_messages(fields)
    named = tool_named(fields)
    if fields.tool_choice == "none":
        tools = ()
    variables = read_variables(fields, encoder)
    ids = encode_chat(encoder, messages, tools, variables)
    serving.require_room(len(ids), "messages")
    form = serving.reply_format(variables)
    grammar = _grammar(serving, fields, form, tools, named)
    requests = [
        Request(
            ids,
            sampling,
            fields.stops,
            fields.num_logprobs,
            adapter,
            serving.grammars.start(grammar, form) if grammar else None,
        )
        for sampling in fields.samplings(serving.settings)
    ]
    fields.messages, fields.tools, fields.response_format = [], None, None  # not kept while the reply is generated
    return serving, fields, Asked(requests, form, tools)


def _grammar(
    serving: Serving, fields: ChatFields, form: ReplyFormat, tools: Sequence[dict[str, Any]], named: str | None
) -> str | None:
    """The grammar that replies must follow, if any."""
    schema = shape_of(fields)
    if named is not None or fields.tool_choice == "required":
        if not tools:
            raise ApiError(400, "tool_choice: needs tools.", code="invalid-value", param="tool_choice")
        if schema is not None:
            text = "response_format: cannot be combined with this tool_choice."
            raise ApiError(400, text, code="invalid-value", param="response_format")
        return serving.grammars.of_calls(form, tools, named, "tool_choice")
    return None if schema is None else serving.grammars.of_schema(schema, "response_format")


@dataclass(slots=True)
class _Choice:
    """One choice as it is read."""

    reader: ReplyReader
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class ChatReply:
    """The response to a chat request as its tokens come."""

    replies: Replies

    def __init__(self, serving: Serving, fields: ChatFields, asked: Asked) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._serving, self._fields = serving, fields
        self._texts: TokenTexts = serving.texts
        self._stop_ids = serving.speaker.stop_ids
        self._choices = [_Choice(ReplyReader(asked.form, bool(asked.tools), asked.tools)) for _ in asked.requests]
        self._num_prompt, self._num_tokens = len(asked.requests[0].ids), 0
        serving.metrics.prompt_tokens.inc(self._num_prompt)

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def read(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take a token in; the chunks that a stream sends for it."""
        choice, token = self._choices[piece.index], piece.token
        assert token is not None
        self._num_tokens += 1
        self._serving.metrics.tokens.inc()
        parts = choice.reader.push(token.text)
        reason = token.finish_reason
        if reason is not None:
            parts += choice.reader.finish()
        logprobs = self._logprobs(piece)
        choice.logprobs += logprobs
        for part in parts:
            if choice.finish_reason is not None:  # one call only, and this is another
                break
            delta = self._take(choice, part)
            if delta:
                yield self._chunk(piece.index, delta, logprobs)
                logprobs = []
        if logprobs:
            yield self._chunk(piece.index, {"content": ""}, logprobs)
        if choice.finish_reason is not None and reason is None:
            self.replies.cancel(piece.index)
        if reason is not None and choice.finish_reason is None:
            choice.finish_reason = "tool_calls" if choice.calls and reason == "stop" else reason
        if choice.finish_reason is not None:
            yield self._chunk(piece.index, {}, reason=choice.finish_reason)

    def _take(self, choice: _Choice, part: Part) -> dict[str, Any]:
        """Add a part to the choice; the delta of a stream, empty if there is none."""
        if part.kind == "content":
            choice.content.append(part.text)
            return {"content": part.text}
        if part.kind == "reasoning":
            choice.reasoning.append(part.text)
            return {"reasoning_content": part.text}
        if part.kind == "call":
            function = {"name": part.text, "arguments": ""}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            choice.calls.append(call)
            return {"tool_calls": [{"index": len(choice.calls) - 1, **call, "function": dict(function)}]}
        if part.kind == "arguments":
            choice.calls[-1]["function"]["arguments"] += part.text
            return {"tool_calls": [{"index": len(choice.calls) - 1, "function": {"arguments": part.text}}]}
        if self._fields.parallel_tool_calls is False:
            choice.finish_reason = "tool_calls"
        return {}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        token = piece.token
        if not self._fields.logprobs or token is None or token.logprob is None or token.id in self._stop_ids:
            return []
        top = [self._texts.entry(one, value) for one, value in token.top_logprobs]
        return [{**self._texts.entry(token.id, token.logprob), "top_logprobs": top}]

    def end(self) -> Iterable[dict[str, Any]]:
        if self._fields.wants_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._fields.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[dict[str, Any]] = (), reason: str | None = None
    ) -> dict[str, Any]:
        shown = {"content": list(logprobs), "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._fields.wants_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._fields.model}

    def _usage(self) -> dict[str, int]:
        total = self._num_prompt + self._num_tokens
        return {"prompt_tokens": self._num_prompt, "completion_tokens": self._num_tokens, "total_tokens": total}


def _message(choice: _Choice) -> dict[str, Any]:
    content = "".join(choice.content)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content or (None if choice.calls else ""),
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = "".join(choice.reasoning)
    if choice.calls:
        message["tool_calls"] = choice.calls
    return message
