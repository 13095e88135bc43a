"""The parsed forms of a row: Conversation, RawText or Segments. Later stages never see raw keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NOTE_UNANSWERED = "ends with an unanswered turn, which is left out"
NOTE_EMPTY_QUESTION = "has an empty question"
NOTE_EMPTY_CONTEXT = "has an empty system or tool turn"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; may be empty where there are tool_calls or reasoning_content.
        reasoning_content: reasoning before the answer.
        tool_calls: [{"id": str (where the row has one), "type": "function", "function": {"name": str, "arguments":
            dict, or the JSON text of one as in the row}}]. Each template gets the form that it reads.
        is_trained: whether an assistant turn is trained (loss_weight 0: no).
        name: of the speaker or tool, for templates that print it.
        tool_call_id: of a tool turn, the id of the call that it answers.
        context_spans: characters [start, end) of content that are context in a trained turn: the prefill of a prompt,
            the parts that Axolotl's train_detail excludes. Sorted, without overlap.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    is_trained: bool = True
    name: str | None = None
    tool_call_id: str | None = None
    context_spans: tuple[tuple[int, int], ...] = ()

    def to_template(self) -> dict[str, Any]:
        """The dict that chat templates expect."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name:
            message["name"] = self.name
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with at least one trained assistant turn; the last turn is the assistant's.

    Attributes:
        tools: schemas as {"type": "function", "function": {...}}.
        notes: peculiarities of a used row, counted in the ledger (unread keys among them).
        template_kwargs: template variables of the row (chat_template_kwargs); they override the config's.
        documents: texts for templates that read `documents` (retrieval), as in the row.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class RawText:
    """Text for pre-training; every token is trained.

    Attributes:
        digest: of the whole text, where `text` is only the beginning of a document that is not in memory; else "".
    """

    text: str
    notes: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Segments:
    """Rendered text in pieces, each trained or context; no template (Axolotl's input_output)."""

    parts: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...] = ()


Parsed = Conversation | RawText | Segments


class RowRefused(Exception):
    """This row cannot be trained on. The reason goes into the ledger.

    Args:
        reason: where, what, why and what to do.
        by_choice: the user asked to leave such rows out, or rows of this kind are never trained on; they do not count
            against data.max_refused.
        loses_context: no format reads a key of the row that its replies may depend on; `check` reports this as an
            error.
        code: cause of the refusal in kebab-case ("empty-reply"); it stays the same when the reason is reworded.
    """

    def __init__(self, reason: str, by_choice: bool = False, loses_context: bool = False, *, code: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_choice = by_choice
        self.loses_context = loses_context
        self.code = code


class UnknownFormat(RowRefused):
    """The keys of the row match no known format."""


def find_lone_surrogate(text: str) -> str | None:
    """The first half character ("\\ud83d" in JSON), which has no bytes and so no tokens; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None
