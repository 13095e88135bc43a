"""Turn text into token ids, in one place for training, preview, chat and serving."""

from __future__ import annotations

import bisect
import datetime
import itertools
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import NO_VARIABLES, ChatTemplate, Renderer, RenderSettings
from tunesmith.encode.longtext import PIECE, encode_long
from tunesmith.encode.messages import prepare_messages
from tunesmith.encode.shield import MARK, Shield, unmark_offsets, without_added_tokens
from tunesmith.encode.stops import Stops, find_stops
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message, RowRefused, find_lone_surrogate
from tunesmith.tokens.unknown import drops_text
from tunesmith.tokens.words import Ids, WordEncoder

_SHORT_TAIL = 64  # characters; longer ones are not generation prompts and seldom repeat
_STAND_INS = ("Hello, world.", "你好 🙂 שלום", "  x = 1\n\n", "12 e\u0301", "\n- a\tb ", "A")


class Encoding:
    """Token ids of a text, and the characters [start, end) of each token.

    Byte-level pieces of one character share that character's span. If `is_exact` is False, text that spells a control
    token could not be shown to encode as it would within the whole text, and nothing in it may be trained.

    Args:
        source: the tokenizer's own result for exactly these ids, used instead of a list of spans.
    """

    __slots__ = ("_offsets", "_source", "ids", "is_exact")

    def __init__(
        self,
        ids: MutableSequence[int],
        offsets: list[tuple[int, int]] | None = None,
        is_exact: bool = True,
        source: Any = None,
    ) -> None:
        self.ids, self.is_exact, self._offsets, self._source = ids, is_exact, offsets, source

    @property
    def offsets(self) -> list[tuple[int, int]]:
        if self._offsets is None:
            self._offsets = self._source.offsets
        return self._offsets

    def span(self, index: int) -> tuple[int, int]:
        """Characters [start, end) of a token."""
        span = self._source.token_to_chars(index) if self._offsets is None else None
        return span or self.offsets[index]

    def first_from(self, char: int) -> int:
        """Index of the first token that begins at a character or after it."""
        if self._offsets is None:
            index = self._source.char_to_token(char)
            if index is not None and self._source.token_to_chars(index)[0] == char:
                return int(index)
        return bisect.bisect_left(self.offsets, char, key=lambda span: span[0])


class Encoder:
    """A tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer with a Rust backend (needed for character offsets).
        template: the chat template; with None, prompt, completion and EOS are concatenated.
        defaults: date and template variables for requests that give none; those of the run.
        control_text: data.control_text; with "allow", spellings of control tokens become these tokens.

    Raises:
        ModelError: the tokenizer has no offsets or lacks a required EOS, or the template ends replies without a token
            that generation could stop at.
    """

    def __init__(
        self, tokenizer: Any, template: ChatTemplate | None, defaults: RenderSettings, control_text: str = "plain"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.control_text = control_text
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer ({type(tokenizer).__name__}) has no fast backend and so no character offsets, which "
                "are needed to prove labels with. Save it with a tokenizer.json (AutoTokenizer.from_pretrained(..., "
                "use_fast=True)).",
                code="tokenizer-not-fast",
            )
        backend.no_truncation()  # tokenizer.json may contain settings that silently truncate or pad
        backend.no_padding()
        self._backend = backend
        self._added_texts = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        self.added_ids = frozenset(self._added_texts)
        self.shield = Shield(backend)
        self._borders = self.added_ids - {self.shield.unknown_id}  # text and marks may encode to the unknown token
        self._tails: dict[str, list[int]] = {}  # texts from the last control token to a reply; there are few
        self.bos_ids = bos_ids(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.is_control = np.zeros(max([*backend.get_vocab(with_added_tokens=True).values(), 0]) + 1, dtype=bool)
        self.is_control[sorted(self.shield.ids)] = True
        self.stop, self.call_stop = find_stops(self, self.renderer())

    def encode_texts(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids of rendered texts; no special tokens are added."""
        if any(len(text) > 2 * PIECE for text in texts):
            return [self._encode_alone(text) for text in texts]
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._encode_marked(text, e) if MARK in text else Encoding(e.ids, source=e)
            for text, e in zip(texts, encodings, strict=True)
        ]

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        """`encode_ids` in arrays; words that came before are not encoded again where the tokenizer allows it."""
        words = self._words
        if words is None:
            return [np.array(ids, np.uint32) for ids in self.encode_ids(texts)]
        taken = [words.takes(text) and len(text) <= 2 * PIECE for text in texts]
        found = iter(words.encode(list(itertools.compress(texts, taken))))
        others = iter(self.encode_ids([text for text, is_taken in zip(texts, taken, strict=True) if not is_taken]))
        return [next(found) if is_taken else np.array(next(others), np.uint32) for is_taken in taken]

    @cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._backend)

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without shield marks; faster, since no character spans are computed."""
        if any(len(text) > 2 * PIECE for text in texts):
            return [list(encoding.ids) for encoding in self.encode_texts(texts)]
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_alone(self, text: str) -> Encoding:
        if len(text) > 2 * PIECE and MARK not in text:
            found = encode_long(self._backend, text)
            return Encoding(found.ids, source=found)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return self._encode_marked(text, encoding) if MARK in text else Encoding(encoding.ids, source=encoding)

    def encode_tail(self, text: str) -> list[int]:
        """Ids of a short text between a control token and a reply; cached, since there are few of them."""
        ids = self._tails.get(text) or list(self.encode_texts([text])[0].ids)
        if len(text) <= _SHORT_TAIL:
            self._tails[text] = ids
        return ids

    def find_added(self, text: str) -> list[int]:
        """Ids of the added tokens in a text, in order."""
        return [token for token in self.encode_texts([text])[0].ids if token in self.added_ids]

    def added_text(self, token_id: int) -> str:
        return str(self._added_texts[token_id])

    @cached_property
    def _blind(self) -> Any:
        return without_added_tokens(self._backend)

    def _encode_marked(self, text: str, with_marks: Any) -> Encoding:
        """Encode control tokens where the template wrote them, and the unmarked text between them as plain text.

        The marked text itself shows that each stretch encodes alone as it does between control tokens.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start, first, is_exact = 0, 0, True
        ends = [*(i for i, token in enumerate(with_marks.ids) if token in self._borders), len(with_marks.ids)]
        for index in ends:
            at_end = index == len(with_marks.ids)
            stop, behind = (len(text), len(text)) if at_end else with_marks.offsets[index]
            stretch = text[start:stop]
            if stretch:
                is_exact &= self._blind.encode(stretch, add_special_tokens=False).ids == with_marks.ids[first:index]
                plain = self._blind.encode(stretch.replace(MARK, ""), add_special_tokens=False)
                is_exact &= self.shield.ids.isdisjoint(plain.ids)
                ids += plain.ids
                offsets += [(start + a, start + b) for a, b in unmark_offsets(stretch, plain.offsets)]
            if not at_end:
                ids.append(with_marks.ids[index])
                offsets.append((stop, behind))
            start, first = behind, index + 1
        return Encoding(ids, offsets, is_exact)

    def find_border(self, whole: Encoding, prompt: str) -> int | None:
        """Index of the first token after a prompt that a text begins with; None if its ids are not the prompt's.

        Encoding splits at control tokens, so the prompt is encoded from its last one on. The whole prompt is encoded
        if this does not give the text's ids, or if stand-in chats show that this tokenizer does not split there.
        """
        if self._splits_at_controls and (border := self._find_border_from_control(whole, prompt)) is not None:
            return border
        return self._find_border_from_start(whole, prompt)

    def _find_border_from_control(self, whole: Encoding, prompt: str) -> int | None:
        behind = whole.first_from(len(prompt))
        control = next((i for i in range(behind - 1, -1, -1) if whole.ids[i] in self._borders), None)
        if control is None:
            return None
        start, end = whole.span(control)
        is_same = end <= len(prompt) and list(whole.ids[control:behind]) == self.encode_tail(prompt[start:])
        return behind if is_same else None

    def _find_border_from_start(self, whole: Encoding, prompt: str) -> int | None:
        alone = self.encode_texts([prompt])[0].ids
        return len(alone) if list(whole.ids[: len(alone)]) == list(alone) else None

    @cached_property
    def _splits_at_controls(self) -> bool:
        """Whether encoding from the last control token on finds the border of the whole prompt.

        Tested with stand-in chats, so that the answer is the same for every row.
        """
        found = [
            (self._find_border_from_control(whole, prompt), self._find_border_from_start(whole, prompt))
            for prompt, whole in self._stand_in_prompts()
        ]
        borders = [(one, other) for one, other in found if one is not None]
        return bool(borders) and all(one == other for one, other in borders)

    def _stand_in_prompts(self) -> Iterator[tuple[str, Encoding]]:
        """Prompts of stand-in chats, each with the encoding of the finished chat that begins with it."""
        renderer = self.renderer()
        if renderer is None:
            return
        for shift in range(len(_STAND_INS)):
            said = [_STAND_INS[(shift + i) % len(_STAND_INS)] for i in range(5)]
            pairs = [Message(role, text) for role, text in zip(("user", "assistant") * 2, said, strict=False)]
            for messages in (pairs, [Message("system", said[-1]), *pairs]):
                for turn in (turn for turn, message in enumerate(messages) if message.role == "assistant"):
                    try:
                        text = renderer.render(messages[: turn + 1])
                        prompt = renderer.render(messages[:turn], add_generation_prompt=True)
                    except TemplateRefused:
                        continue
                    if text.startswith(prompt):
                        yield prompt, self.encode_texts([text])[0]

    def joins(self, prompt: Sequence[int], reply: Sequence[int], text: str) -> bool:
        """Whether separately encoded ids of a prompt and a reply decode to the prompt followed by the reply's text."""
        control = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in self.added_ids), -1)
        tail = list(prompt[control + 1 :])
        before = self._backend.decode(tail, skip_special_tokens=False)
        both = self._backend.decode(tail + list(reply), skip_special_tokens=False)
        return bool(both == before + text.replace(MARK, ""))

    def renderer(self, settings: RenderSettings | None = None) -> Renderer | None:
        """The template under the settings of a request; None if there is no template."""
        return self.template.with_settings(settings or self.defaults) if self.template else None

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        date: datetime.datetime | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[int]:
        """Ids of the prompt for an answer to these messages: rendered up to where the reply begins.

        Args:
            date: today's date for the template; by default that of `defaults`.
            variables: template variables, added to the default ones.
        """
        settings = RenderSettings(date or self.defaults.date, {**self.defaults.variables, **variables})
        renderer = self.renderer(settings)
        try:
            habits = renderer.habits if renderer else None
            chat = prepare_messages(messages, habits, self.shield, self.control_text, tools)
        except RowRefused as refusal:
            raise ModelError(
                f"the conversation {refusal.reason}. Change the conversation.", code="conversation-refused"
            ) from None
        if renderer is None:
            return self.bos_ids + self._encode_typed("".join(message.content for message in chat.messages))
        try:
            text = renderer.render(chat.messages, chat.tools, add_generation_prompt=True)
        except TemplateRefused as refusal:
            raise ModelError(
                f"the chat template rejects this conversation: {refusal}", code="template-refused"
            ) from None
        return self._encode_typed(text)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain text to continue, begun as texts of pre-training are; control text in it is marked already.

        Raises:
            ModelError: the text cannot be encoded.
        """
        return self.bos_ids + self._encode_typed(text)

    def _encode_typed(self, text: str) -> list[int]:
        half = find_lone_surrogate(text)
        if half:
            raise ModelError(
                f"the conversation contains the lone surrogate {half!r} (half a character), which no tokenizer can "
                "encode. Type the text again.",
                code="lone-surrogate",
            )
        encoding = self.encode_texts([text])[0]
        if not encoding.is_exact:
            raise ModelError(
                "the conversation spells a control token, which this tokenizer may not keep as text. Remove the "
                "control token.",
                code="control-text-inexact",
            )
        return list(encoding.ids)

    @cached_property
    def drops_text(self) -> bool:
        """Whether the tokenizer drops characters that it cannot encode, without a token in their place."""
        return bool(drops_text(self._backend))

    @property
    def stops(self) -> Stops:
        """Texts of the tokens that end a reply."""
        return Stops(self.stop.text, self.call_stop.text)

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens at which generation stops."""
        return list(dict.fromkeys([self.stop.id, self.call_stop.id]))

    def stop_id(self, text: str) -> int:
        return self.stop.id if text == self.stop.text else self.call_stop.id


def bos_ids(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer adds before a plain text: [bos], or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
