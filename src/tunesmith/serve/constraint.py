"""Constrained replies: JSON of a schema, or a tool call, by the grammars of llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.generation.decode import PieceDecoder
from tunesmith.generation.reply_parts import ReplyFormat, ReplyReader
from tunesmith.serve.errors import ApiError

if TYPE_CHECKING:
    from tunesmith.generation.speaker import Speaker

_BLANKS = r"[\x20\x0A]{0,32}"  # between values; without a limit a weak model writes white space for ever
_BITS = torch.arange(8, dtype=torch.uint8)


class Grammars:
    """Makes constraints for the replies of one model."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._lock = threading.Lock()
        self._tokens: Any = None

    def of_schema(self, schema: str, param: str) -> str:
        """The grammar of a JSON schema.

        Raises:
            ApiError: llguidance is missing, or does not support the schema.
        """
        tokens = self._tokenizer(param)
        from llguidance import LLMatcher

        try:
            grammar = str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _BLANKS}))
            problem = LLMatcher.validate_grammar(grammar, tokens)
        except (ValueError, RecursionError) as error:
            grammar, problem = "", str(error)
        if problem:
            text = " ".join(str(problem).split())[:300]
            raise ApiError(
                400, f"{param}: this schema is not supported: {text}", code="unsupported-schema", param=param
            )
        return grammar

    def of_calls(self, form: ReplyFormat, tools: Sequence[dict[str, Any]], name: str | None, param: str) -> str:
        """The grammar of a call of one of these tools, as the model's template writes it.

        Args:
            name: the only tool that may be called.

        Raises:
            ApiError: the template's calls cannot be made sure of.
        """
        tokens = self._tokenizer(param)
        from llguidance import LLMatcher

        chosen = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
        if not chosen:
            raise ApiError(400, f"{param}: there is no tool {name!r:.100} in tools.", code="invalid-value", param=param)
        shape = form.shapes.calls
        if shape is None or not form.writes_calls or shape.entries or not shape.middle:
            raise ApiError(
                400, f"{param}: this model's chat template writes tool calls in a way that cannot be enforced here. "
                'Use "auto" or "none".', code="unsupported-tool-choice", param=param,
            )  # fmt: skip
        rest = "}" * (len(shape.path) + 1) if shape.keys else ""
        options = []
        for function in chosen:
            written = json.dumps(function["name"], ensure_ascii=False)[1:-1] if shape.keys else function["name"]
            head = self._literal(f"{shape.opening}{shape.head}".lstrip())
            middle = self._literal(shape.middle)
            tail = self._literal(f"{rest}{shape.tail}{shape.closing}".rstrip())
            self._require_plain(function["name"])
            options.append(f"{head} {_quoted(written)} {middle} %json {_parameters(function)} {tail}")
        grammar = str(LLMatcher.grammar_from_lark("start: " + "\n     | ".join(options)))
        if problem := LLMatcher.validate_grammar(grammar, tokens):
            text = " ".join(str(problem).split())[:300]
            raise ApiError(400, f"tools: a schema is not supported: {text}", code="unsupported-schema", param="tools")
        return grammar

    def start(self, grammar: str, form: ReplyFormat) -> GrammarConstraint:
        """A constraint for one reply; after its reasoning, where the prompt has begun one."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar)
        return GrammarConstraint(matcher, self._speaker, form)

    def _require_plain(self, name: str) -> None:
        """Raises:
        ApiError: the name has the text of an added token, which llguidance would take for that token.
        """
        encoder = self._speaker.encoder
        if any(encoder.added_text(token) in name for token in encoder.added_ids):
            text = f"tools: the name {name!r:.100} has the text of a control token, so its call cannot be enforced."
            raise ApiError(400, text, code="invalid-value", param="tools")

    def _literal(self, text: str) -> str:
        """A text in a grammar; added tokens in it by their ids, since texts never match them."""
        encoder = self._speaker.encoder
        added = sorted(encoder.added_ids, key=lambda token: -len(encoder.added_text(token)))
        pieces: list[str] = []
        start = at = 0
        while at < len(text):
            token = next((one for one in added if text.startswith(encoder.added_text(one), at)), None)
            if token is None:
                at += 1
                continue
            pieces += [_quoted(text[start:at])] if at > start else []
            pieces.append(f"<[{token}]>")
            at += len(encoder.added_text(token))
            start = at
        pieces += [_quoted(text[start:])] if start < len(text) else []
        return " ".join(pieces)

    def _tokenizer(self, param: str) -> Any:
        if find_spec("llguidance") is None:
            raise ApiError(
                400, f"{param}: this server lacks llguidance, which it needs for this. Its operator can install it: "
                "pip install 'tunesmith[serve]'", code="unsupported-field", param=param,
            )  # fmt: skip
        with self._lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                encoder = self._speaker.encoder
                size = max(self._speaker.num_embeddings, len(encoder.is_control))
                self._tokens = from_tokenizer(encoder.tokenizer, size, sorted(self._speaker.stop_ids))
        return self._tokens


def _parameters(function: dict[str, Any]) -> str:
    """The JSON schema of a tool's arguments, with bounded white space.

    Raises:
        ApiError: it is not an object.
    """
    schema = function.get("parameters") or {"type": "object"}
    if not isinstance(schema, dict):
        text = f"tools: parameters must be a JSON schema, not {type(schema).__name__}."
        raise ApiError(400, text, code="unsupported-schema", param="tools")
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class GrammarConstraint:
    """The tokens that a grammar allows in one row; see `Constraint`."""

    def __init__(self, matcher: Any, speaker: Speaker, form: ReplyFormat) -> None:
        self._matcher = matcher
        self._stop_ids = sorted(speaker.stop_ids)
        self._size = speaker.num_embeddings
        self._reader = ReplyReader(form, has_tools=False) if form.shapes.begins_inside else None
        self._decoder = PieceDecoder(speaker.encoder)

    def mask(self) -> Tensor:
        if self._reader is not None:  # reasoning is free
            free = torch.ones(self._size, dtype=torch.bool)
            free[self._stop_ids] = False
            return free
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._require_no_error()
        allowed = ((packed[:, None] >> _BITS) & 1).flatten()[: self._size].bool()
        # a reply that can neither go on nor end here is an error of the row: it must not pass as complete
        allowed[self._stop_ids] = self._matcher.is_accepting()
        return allowed

    def accept(self, token_id: int) -> None:
        if self._reader is None:
            self._matcher.consume_token(token_id)
            self._require_no_error()
            return
        self._reader.push(self._decoder.push(token_id))
        if not self._reader.is_reasoning:
            self._reader = None

    def _require_no_error(self) -> None:
        """Raises:
        ValueError: the grammar has become too large for the library's limits, or another error of it.
        """
        if self._matcher.is_error():
            text = str(self._matcher.get_error()).partition("<state>")[0].strip()  # what follows is for its developers
            raise ValueError("no text can follow this schema" if text.startswith("NoExtension") else text)
