"""Mark control tokens spelled in messages, so that text never becomes a control token.

A tokenizer matches its added tokens anywhere in a text, including inside messages. Before a chat is rendered, every
such spelling in a message gets a mark inside it, so that no token matches. The template writes its own control tokens
around the marked text, and the encoder removes the marks after it has found the real tokens. Spellings that become a
token only after normalization are handled in disguise.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.encode.disguise import Disguises, find_at_risk
from tunesmith.rows.conversation import Conversation, Message, RowRefused
from tunesmith.tokens.unknown import unknown_id

MARK = "\ufdd0"  # a noncharacter, reserved by Unicode for internal use


class Shield:
    """Mark spellings of a tokenizer's added tokens.

    Tokens of whitespace only or of one character are skipped: they only shorten texts (indented code, an emoji).

    Args:
        backend: a `tokenizers.Tokenizer`.

    Attributes:
        ids: ids of the tokens that no text may become.
        unknown_id: the token that represents text that the vocabulary cannot encode, if there is one.
    """

    def __init__(self, backend: Any) -> None:
        tokens = {number: token for number, token in backend.get_added_tokens_decoder().items() if _is_guarded(token)}
        self.unknown_id = unknown_id(backend)
        self.ids = frozenset(tokens) - {self.unknown_id}
        texts = {token.content for token in tokens.values()}
        # a lookahead consumes nothing, so that overlapping tokens are all found
        spellings = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        self._spelling = re.compile(f"(?={spellings})") if texts else None
        self._starts = frozenset(text[:2] for text in texts)
        at_risk = find_at_risk(backend, {number: tokens[number] for number in self.ids})
        neighbour = next((t.content for t in tokens.values() if not (t.normalized or t.lstrip or t.rstrip)), "")
        self._disguises = Disguises(backend, at_risk, neighbour) if at_risk else None

    def holds(self, text: str) -> bool:
        """Whether a text contains the exact spelling of an added token."""
        if self._spelling is None:
            return False
        for start in self._starts:  # some tokenizers have a thousand added tokens, which share a few first characters
            if start in text:
                return self._spelling.search(text) is not None
        return False

    def mark(self, value: Any) -> Any:
        """A text, or JSON of texts, with a mark inside every spelling of an added token.

        Raises:
            RowRefused: the text contains the mark, or a spelling that marks do not break up.
        """
        if isinstance(value, str):
            if MARK in value:
                raise RowRefused(
                    "contains the noncharacter U+FDD0, which tunesmith uses to mark text. Remove it",
                    code="mark-in-text",
                )
            marked = self._mark_spellings(value)
            return self._disguises.mark(marked, MARK) if self._disguises else marked
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(below) for key, below in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.mark(item) for item in value)
        return value

    def _mark_spellings(self, text: str) -> str:
        """The text with a mark after the first character of every spelling."""
        if self._spelling is None or not self.holds(text):
            return text
        places = [match.start() + 1 for match in self._spelling.finditer(text)]
        return MARK.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True))

    def mark_message(self, message: Message) -> Message:
        """The message with its texts marked; the same object if no mark was needed."""
        said = (message.content, message.reasoning_content, message.tool_calls, message.name, message.tool_call_id)
        marked: tuple[Any, ...] = tuple([self.mark(value) if value else value for value in said])
        if marked == said:
            return message
        content, reasoning, calls, name, call_id = marked
        places = [place for place, char in enumerate(content) if char != MARK]
        spans = tuple((places[start], places[end - 1] + 1) for start, end in message.context_spans if start < end)
        return replace(message, content=content, reasoning_content=reasoning, tool_calls=calls, name=name,
                       tool_call_id=call_id, context_spans=spans)  # fmt: skip

    def mark_conversation(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """The conversation with its texts marked, and whether any mark was needed."""
        messages = tuple([self.mark_message(message) for message in conversation.messages])
        said = (conversation.tools, conversation.documents, conversation.template_kwargs)
        marked: tuple[Any, ...] = tuple([self.mark(value) if value else value for value in said])
        if messages == conversation.messages and marked == said:
            return conversation, False
        tools, documents, variables = marked
        return replace(
            conversation, messages=messages, tools=tools, documents=documents, template_kwargs=variables
        ), True


def _is_guarded(token: Any) -> bool:
    return len(token.content.replace("\u2581", " ").strip()) > 1  # SentencePiece writes a space as U+2581


def without_added_tokens(backend: Any) -> Any:
    """A copy of the tokenizer without its added tokens: every text is ordinary text to it."""
    from tokenizers import Tokenizer

    settings = json.loads(backend.to_str())
    settings["added_tokens"], settings["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(settings))


def unmark_offsets(marked: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Convert offsets into the unmarked text to offsets into the marked text."""
    places = [place for place, char in enumerate(marked) if char != MARK]
    return [(places[a], places[b - 1] + 1) if b > a else (places[a] if a < len(places) else len(marked),) * 2
            for a, b in offsets]  # fmt: skip
