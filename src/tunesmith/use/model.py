"""A model opened for use in Python: replies to one conversation or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.generation.replies import reply_to, stream_reply
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.rows.chats import read_question
from tunesmith.rows.conversation import RowRefused

Question = str | Sequence[Mapping[str, Any]]


class Model:
    """A model that answers, opened by `tunesmith.load`.

    It encodes with the code that training labels with. The methods take a text, which becomes the user's turn, or a
    list of messages ({"role", "content"}, also with tool calls and in the other spellings of training rows). Their
    keyword arguments are those of `Sampling`: max_new_tokens (512), temperature (0: greedy), top_p, top_k, min_p and
    repetition_penalty (each None: as the model's generation_config says), seed (0) and stop, a text or several that
    end the reply.

    Attributes:
        speaker: the model, its encoder and its adapters.
    """

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker

    def reply(self, messages: Question, *, tools: Any = (), **sampling: Any) -> str:
        """The text of the reply, without its stop token.

        Raises:
            ModelError: the messages cannot be read or encoded, or leave no room for a reply in the context.
        """
        return "".join(self.stream(messages, tools=tools, **sampling))

    def stream(self, messages: Question, *, tools: Any = (), **sampling: Any) -> Iterator[str]:
        """The pieces of the reply as they come; joined they are what `reply` returns."""
        pieces = stream_reply(self.speaker, self.prompt_ids(messages, tools=tools), Sampling(**sampling))
        return (piece for piece in pieces if piece)

    def batch(self, conversations: Sequence[Question], *, tools: Any = (), **sampling: Any) -> list[str]:
        """A reply to each conversation, computed together; each is what `reply` returns for it alone."""
        if isinstance(conversations, (str, Mapping)):
            raise ModelError("batch: takes a list of conversations; reply answers one.", code="messages-unreadable")
        prompts = [self.prompt_ids(messages, tools=tools) for messages in conversations]
        return [reply.text for reply in reply_to(self.speaker, prompts, Sampling(**sampling))]

    def prompt_ids(self, messages: Question, *, tools: Any = ()) -> list[int]:
        """Token ids of the prompt that `reply` answers, for other engines: text in a message stays text.

        Raises:
            ModelError: the messages cannot be read or encoded.
        """
        try:
            if isinstance(messages, Mapping) or not all(isinstance(turn, (str, Mapping)) for turn in messages):
                raise TypeError("they must be a text or a list of dicts with role and content")
            given = messages if isinstance(messages, str) else [dict(turn) for turn in messages]
            turns, schemas = read_question(given, list(tools) if isinstance(tools, tuple) else tools)
        except (RowRefused, TypeError, ValueError) as refusal:
            raise ModelError(f"the messages cannot be read: {refusal}", code="messages-unreadable") from None
        return self.speaker.encoder.encode_prompt(turns, schemas)

    @property
    def adapters(self) -> list[str]:
        """Names of the opened adapters, for `switch`."""
        return self.speaker.adapter_names

    def switch(self, adapter: str) -> None:
        """Answer with another of the opened adapters; "base": with none."""
        if adapter not in (*self.adapters, "base"):
            known = ", ".join([*self.adapters, "base"]) if self.adapters else "none"
            raise ModelError(f"{adapter!r}: no such adapter is open; open are: {known}", code="unknown-adapter")
        self.speaker.switch(adapter)
