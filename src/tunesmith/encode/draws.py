"""Draw by the seed which chats get a system prompt, and which lose the empty think block that the template writes.

A draw depends on the seed, the row's number in its file and the row's own turns, and on nothing else: not on other
rows, the files' names and order, data.limit, the template or the tokenizer. So preview, check, train and resume draw
alike. A row drawn at one share is drawn at every larger share too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from tunesmith.config.data_keys import DataSection
from tunesmith.rows.conversation import Conversation, Message

_BITS = 53  # of a float: a drawn number is below 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn for a row.

    Attributes:
        system_prompt: to add before its turns; None for none.
        keeps_empty_think: whether its empty think blocks stay as the template writes them.
    """

    system_prompt: str | None = None
    keeps_empty_think: bool = True


UNCHANGED = Draw()


@dataclass(frozen=True, slots=True)
class RowDraws:
    """The config's shares and the run's seed.

    Attributes:
        system_prompts: data.system_prompts, one of which is drawn for a row.
        system_prompt_share: of the chats that have neither a system turn nor tools.
        empty_think_share: of the rows that keep their empty think blocks.
        seed: train.seed.
    """

    system_prompts: tuple[str, ...]
    system_prompt_share: float
    empty_think_share: float
    seed: int

    @classmethod
    def of(cls, data: DataSection, seed: int) -> RowDraws | None:
        """The draws of a config; None if it leaves every row as it is."""
        draws = cls(tuple(data.system_prompts), data.system_prompt_share, data.empty_think_share, seed)
        adds = bool(draws.system_prompts) and draws.system_prompt_share > 0
        return draws if adds or draws.empty_think_share < 1 else None

    def draw(self, number: int, conversation: Conversation) -> Draw:
        """What is drawn for a row.

        Args:
            number: of the row in its file.
            conversation: as it was read, before anything is added to it.
        """
        said = [(message.role, message.content, message.reasoning_content) for message in conversation.messages]
        digest = hashlib.blake2b(json.dumps([self.seed, number, said]).encode(), digest_size=24).digest()
        adds, which, keeps = (int.from_bytes(digest[at : at + 8]) >> 64 - _BITS for at in (0, 8, 16))
        prompt = None
        if self.system_prompts and adds / 2**_BITS < self.system_prompt_share and _takes_prompt(conversation):
            prompt = self.system_prompts[which * len(self.system_prompts) >> _BITS]
        return Draw(prompt, keeps / 2**_BITS < self.empty_think_share)


def _takes_prompt(conversation: Conversation) -> bool:
    """Chats with tools get no system prompt: where their tools are described, templates write one of their own."""
    if conversation.tools:
        return False
    return not any(m.role in ("system", "tool") or m.tool_calls for m in conversation.messages)


def add_system_prompt(conversation: Conversation, text: str | None) -> Conversation:
    """The chat with a system turn before its first turn; unchanged without a text."""
    if text is None:
        return conversation
    return replace(conversation, messages=(Message("system", text), *conversation.messages))
