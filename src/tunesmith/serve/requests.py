"""Requests of OpenAI's API: their fields, checked one by one, and the prompts that they bring.

Fields that would change a reply and are not supported are refused; those that change nothing here are accepted.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tunesmith.encode.encoder import Encoder
from tunesmith.encode.messages import prepare_text
from tunesmith.errors import ModelError
from tunesmith.generation.sampling import Sampling
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.rows.keys import Reading
from tunesmith.rows.tools import parse_tools
from tunesmith.rows.turns import parse_turns
from tunesmith.serve.errors import ApiError
from tunesmith.serve.settings import ServeSettings

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention")  # fmt: skip
"""Fields that clients send and that change nothing here."""
UNSUPPORTED = ("audio", "function_call", "functions", "modalities", "moderation", "prediction", "suffix", "verbosity",
               "web_search_options", "logit_bias", "frequency_penalty", "presence_penalty")  # fmt: skip
"""Fields of OpenAI's API that are refused, except with values that ask for nothing."""
_ASKS_NOTHING: tuple[Any, ...] = (None, 0, 0.0, {}, [], "", ["text"])
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OF_CLIENTS = ("refusal", "annotations", "audio", "function_call")  # in replies that clients send back, empty
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})
_COMPLETION_TOKENS = 16  # OpenAI's default there
_MAX_STOPS, _MAX_CHOICES, _MAX_TOP_LOGPROBS = 4, 128, 20
_MAX_STOP_LENGTH = 1000  # characters; each token is compared with all beginnings of a stop string


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Fields(BaseModel):
    """What chat and completion requests have in common; None: not given."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]], BeforeValidator(_as_list), Field(max_length=_MAX_STOPS)] | None = None  # fmt: skip  # noqa: E501
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def samplings(self, settings: ServeSettings) -> list[Sampling]:
        """The settings of each choice; a request without a seed gets other replies each time."""
        chosen: dict[str, Any] = dict(settings.sampling)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            chosen[name] = chosen.get(name) if getattr(self, name) is None else getattr(self, name)
        chosen["top_k"] = None if chosen["top_k"] is None else max(0, chosen["top_k"])
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [
            Sampling(max_new_tokens=self.max_new_tokens(settings), seed=(first + choice) % 2**63, **chosen)
            for choice in range(self.num_choices)
        ]

    def max_new_tokens(self, settings: ServeSettings) -> int:
        return min(self.max_tokens or settings.max_new_tokens, settings.max_new_tokens)


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    wanted: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatFields(Fields):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def max_new_tokens(self, settings: ServeSettings) -> int:
        wanted = self.max_completion_tokens or self.max_tokens or settings.max_new_tokens
        return min(wanted, settings.max_new_tokens)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionFields(Fields):
    """A request of /v1/completions."""

    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    def max_new_tokens(self, settings: ServeSettings) -> int:
        wanted = _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return min(wanted, settings.max_new_tokens)


def read_chat(body: dict[str, Any]) -> ChatFields:
    """The fields of a chat request.

    Raises:
        ApiError: one of them is unknown, unsupported or wrong.
    """
    fields: ChatFields = _read(ChatFields, body)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise _wrong("top_logprobs", "needs logprobs to be true")
    if (
        fields.response_format
        and fields.response_format.type == "json_schema"
        and not fields.response_format.json_schema
    ):
        raise _wrong("response_format.json_schema", "is missing")
    if fields.stream_options and not fields.stream:
        raise _wrong("stream_options", "needs stream to be true")
    return fields


def read_completion(body: dict[str, Any]) -> CompletionFields:
    """As `read_chat`, for a completion request."""
    fields: CompletionFields = _read(CompletionFields, body)
    if fields.best_of not in (None, fields.num_choices):
        raise _wrong("best_of", "is not supported; leave it out or give the value of n")
    if fields.stream_options and not fields.stream:
        raise _wrong("stream_options", "needs stream to be true")
    if fields.echo and fields.logprobs is not None:
        raise _wrong("echo", "is not supported together with logprobs")
    return fields


def _read(kind: type[Any], body: dict[str, Any]) -> Any:
    given = {key: value for key, value in body.items() if key not in IGNORED}
    for key in UNSUPPORTED:
        if key in given and given.pop(key) not in _ASKS_NOTHING:
            raise _wrong(key, "is not supported by this server; leave it out", "unsupported-field")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The first problem of a request, with the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "extra_forbidden":
        return _wrong(path, "is not known to this server; leave it out", "unknown-field")
    if first["type"] == "missing":
        return _wrong(path, "is missing", "missing-field")
    return _wrong(path, first["msg"][:1].lower() + first["msg"][1:], "invalid-value")


def _wrong(param: str, text: str, code: str = "invalid-value") -> ApiError:
    shown = param if len(param) <= 100 else f"{param[:100]}..."
    return ApiError(400, f"{shown}: {text}.", code=code, param=shown)


def read_messages(fields: ChatFields) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Turns and tools of a chat request, as rows of training are read.

    Raises:
        ApiError: a turn cannot be read, or has a key that nothing reads.
    """
    turns = [
        {key: value for key, value in turn.items() if key not in _OF_CLIENTS or value not in _ASKS_NOTHING}
        for turn in fields.messages
    ]
    for at, turn in enumerate(turns):
        if turn.get("role") not in _ROLES:
            raise _wrong(f"messages[{at}].role", f"must be one of {', '.join(_ROLES)}")
    reading = Reading()
    try:
        messages, inside = parse_turns(turns, reading)
    except RowRefused as refusal:
        raise _refused(refusal, "messages") from None
    if reading.unread:
        place, key, _ = reading.unread[0]
        raise _wrong(
            "messages", f"the key {key!r} of {place} is not known to this server; leave it out", "unknown-field"
        )
    try:
        return messages, parse_tools(fields.tools or []) or inside
    except RowRefused as refusal:
        raise _refused(refusal, "tools") from None


def _refused(refusal: RowRefused, param: str) -> ApiError:
    reason = refusal.reason.partition(" Name it with --")[0].partition(", or name the key")[0]
    reason = reason.replace("; tunesmith trains on text only", "; this server takes text only")
    return ApiError(400, f"{param}: {reason.rstrip('.')}.", code=refusal.code or "messages-unreadable", param=param)


def read_variables(fields: ChatFields, encoder: Encoder) -> dict[str, Any]:
    """Variables of the chat template in a request, their texts marked so that they become no control tokens.

    Raises:
        ApiError: the template does not read one of them, or it is one that only the server sets.
    """
    given = dict(fields.chat_template_kwargs or {})
    template = encoder.template
    if fields.reasoning_effort is not None:
        if template is None or "reasoning_effort" not in template.reads:
            raise _wrong("reasoning_effort", "this model's chat template has no such setting; leave it out")
        given.setdefault("reasoning_effort", fields.reasoning_effort)
    for name in given:
        is_own = template is not None and name in (_OWN_VARIABLES | template.special_tokens.keys())
        if template is None or is_own or name not in template.reads:
            raise _wrong(f"chat_template_kwargs.{name}", "this model's chat template has no such setting; leave it out")
    try:
        marked: dict[str, Any] = encoder.shield.mark(given)
    except RowRefused as refusal:
        raise _refused(refusal, "chat_template_kwargs") from None
    return marked


def encode_chat(
    encoder: Encoder, messages: Sequence[Message], tools: Sequence[dict[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """Ids of a chat's prompt, by the encoder that training uses.

    Raises:
        ApiError: the template rejects the conversation.
    """
    try:
        return encoder.encode_prompt(messages, tools, date=datetime.datetime.now(), variables=variables)
    except ModelError as error:
        raise ApiError(400, str(error), code=error.code, param="messages") from None


def list_prompts(fields: CompletionFields) -> list[Any]:
    """The prompts of a completion request, not yet read.

    Raises:
        ApiError: it has none.
    """
    prompt = fields.prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt)):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _wrong("prompt", "must be a text, a list of texts, or a list of token ids or of such lists, not empty")
    return prompt


def encode_prompts(prompts: Sequence[Any], encoder: Encoder, num_ids: int) -> list[list[int]]:
    """Ids of prompts: texts, or lists of token ids below `num_ids`.

    Raises:
        ApiError: one is of another type.
    """
    return [_read_prompt(one, encoder, num_ids, f"prompt[{at}]") for at, one in enumerate(prompts)]


def _read_prompt(prompt: Any, encoder: Encoder, num_ids: int, param: str) -> list[int]:
    if isinstance(prompt, str):
        try:
            text, _ = prepare_text(prompt, encoder.shield, encoder.control_text)
            return encoder.encode_text(text)
        except RowRefused as refusal:
            raise _refused(refusal, param) from None
        except ModelError as error:
            raise ApiError(400, str(error), code=error.code, param=param) from None
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        if not 0 <= min(prompt) <= max(prompt) < num_ids:
            raise _wrong(param, f"has a token id outside of 0 to {num_ids - 1:,}")
        return prompt
    raise _wrong(param, "must be a text or a list of token ids, not empty")


def tool_named(fields: ChatFields) -> str | None:
    """The one tool that `tool_choice` names; None for none, auto and required.

    Raises:
        ApiError: it is none of these.
    """
    choice = fields.tool_choice
    if choice is None or choice in ("none", "auto", "required"):
        return None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _wrong("tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name"}}')
    return name


def shape_of(fields: ChatFields) -> str | None:
    """The JSON schema (as text) that the reply must follow; None: any text."""
    wanted = fields.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.wanted if wanted.json_schema else {"type": "object"}
    return json.dumps({} if schema is True else schema)  # the same; llguidance reads objects only
