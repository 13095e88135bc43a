"""Label chats of questions and answers from a plan, with one rendering and one encoding per row.

A template that drops earlier reasoning needs a rendering for each reply, so a long chat would take quadratic time. But
such chats are alike: [system] question answer question answer ... Chats of a few turns, made of stand-in texts, are
labelled with the ordinary proof (render.py), and the text that the template writes around the stand-ins becomes a plan.
The plan of a longer chat repeats its middle. Each control token and each stretch between two of them is an item of the
plan; a stretch is encoded once, however many samples contain it.

Three checks show that a plan holds for a row. While the template rendered the stand-ins and the prompts of their
replies, it inspected none of their texts except for strings that this row's texts do not contain (neutral.py). The
finished chat of the row, rendered by the template itself, must equal the plan's text. And before any plan is used,
plans of a few lengths are filled with sample texts and compared with ordinary labelling; if anything differs, no plan
is used. All of this depends on the template and the tokenizer only, so a row's outcome does not depend on other rows.

Chats that lose their empty think blocks (data.empty_think_share) have plans of their own, made in the same way from the
stand-ins without these blocks. What the template writes for such a row is compared with the plan that has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.chat_template.habits import EmptyThink, TemplateRefused
from tunesmith.chat_template.template import Renderer
from tunesmith.data.labels import Sample, label_rendered
from tunesmith.data.neutral import STAND_IN, Terms, Watcher
from tunesmith.encode.empty_think import find_unreasoned, remove_empty_think
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.render import Rendered, RenderedChat, render_chat
from tunesmith.encode.shield import MARK
from tunesmith.encode.thoughts import has_thoughts
from tunesmith.rows.conversation import Conversation, Message, RowRefused
from tunesmith.tokens.words import Ids

_SMALL = 6  # up to this many pairs, plans are proven one by one; larger plans repeat their middle
_BEYOND = 3
_LARGE = 16  # a template with a larger number may distinguish long chats from the proven ones
_SAMPLES = (
    "Hello, world.",
    "你好，世界。",
    "e\u0301 🙂 שלום",
    "12\n\n    x = 1",
    "a\tb - c!",
    "W",
    "and so on ...",
    "Ünï?",
)

Text = str | int  # part of a stretch: text of the template, or the number of a message (its content)
Item = int | tuple[Text, ...]  # a control token, or a stretch of text between two


@dataclass(frozen=True, slots=True)
class Reply:
    """Position of a trained reply.

    Attributes:
        item: index of the item in which it begins.
        lead: text of the template in that item that belongs to the prompt.
        stop: index of the item of its stop token.
    """

    item: int
    lead: str
    stop: int

    def shift(self, items: int) -> Reply:
        return Reply(self.item + items, self.lead, self.stop + items)


@dataclass(frozen=True, slots=True)
class Part:
    """One sample. `items` follow the first `shared` items of the chat's last sample."""

    shared: int
    items: tuple[Item, ...]
    replies: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All samples of a chat; the last one shares nothing and contains the finished chat."""

    how: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """A row with its plan.

    Attributes:
        items: for each part of the plan its items: control tokens, and the texts of its stretches.
    """

    plan: Plan
    items: tuple[list[int | str], ...]

    @classmethod
    def of(cls, plan: Plan, contents: Sequence[str]) -> Planned:
        return cls(plan, tuple([_fill(item, contents) for item in part.items] for part in plan.parts))

    @property
    def stretches(self) -> Iterator[str]:
        """Texts to encode."""
        return (item for items in self.items for item in items if isinstance(item, str))


class Planner:
    """Make plans for one encoder, and samples from them.

    Args:
        removes: the empty think block to remove from the chats; None to label them as the template writes them.
    """

    def __init__(
        self, encoder: Encoder, renderer: Renderer, train_reasoning: bool, removes: EmptyThink | None = None
    ) -> None:
        self.encoder, self.renderer, self.train_reasoning = encoder, renderer, train_reasoning
        self._removes = removes
        self._written = Planner(encoder, renderer, train_reasoning) if removes else self
        self._plans: dict[tuple[bool, int], Plan | None] = {}
        self._terms: dict[tuple[bool, int], Terms] = {}
        self._small: dict[bool, int] = {}
        self._watcher = Watcher(renderer)
        self._holds: dict[bool, bool] = {}
        self._controls: dict[int, Ids] = {}
        self._may_plan = not _has_greedy_tokens(encoder.tokenizer)

    def plan(self, conversation: Conversation) -> Planned | None:
        """The plan of a chat; None if it must be labelled without one."""
        if not self._may_plan or not self._is_plain(conversation):
            return None
        has_system = conversation.messages[0].role == "system"
        if has_system not in self._holds:
            self._holds[has_system] = self._compare(has_system)
        return self._plan(conversation) if self._holds[has_system] else None

    def _plan(self, conversation: Conversation) -> Planned | None:
        messages = conversation.messages
        has_system = messages[0].role == "system"
        plan = self._find(has_system, len(messages) // 2)
        if plan is None:
            return None
        terms = self._terms[has_system, min(len(messages) // 2, self._small[has_system])]
        if not all(terms.fit(message.content) for message in messages):
            return None
        planned = Planned.of(plan, [message.content for message in messages])
        if self._written is not self:
            return planned if self._written._plan(conversation) else None
        return planned if self._is_as_rendered(planned, conversation) else None

    def has_block(self, conversation: Conversation) -> bool:
        """Whether the plan of a chat lacks a think block that the template writes."""
        if self._written is self:
            return False
        has_system, pairs = conversation.messages[0].role == "system", len(conversation.messages) // 2
        return self._find(has_system, pairs) != self._written._find(has_system, pairs)

    def _render(self, conversation: Conversation) -> RenderedChat:
        rendered = render_chat(conversation, self.renderer, self.encoder.stops, "auto", self.train_reasoning)
        if self._removes is None:
            return rendered
        messages = conversation.messages
        return remove_empty_think(rendered, self._removes, find_unreasoned(messages, messages))

    def _compare(self, has_system: bool) -> bool:
        """Whether plans of a few lengths, filled with sample texts, give the same samples as ordinary labelling."""
        few = self._find_small(has_system)
        for pairs in (1, 2, few, few + 2):
            if self._find(has_system, pairs) is None:
                continue
            for shift in range(len(_SAMPLES) if pairs == 1 else 1):
                chat = _sample_chat(has_system, pairs, shift + pairs)
                planned = self._plan(chat)
                samples = self.label(planned, self.encode(planned.stretches)) if planned else None
                if planned and samples is not None and not self._is_same(planned.plan.how, samples, chat):
                    return False
        return True

    def _is_same(self, how: str, samples: Sequence[Sample], chat: Conversation) -> bool:
        try:
            rendered = self._render(chat)
            encodings = self.encoder.encode_texts([part.text for part in rendered.parts])
            other, proven = label_rendered(rendered, encodings, self.encoder)
        except RowRefused:
            return False
        return (how, len(samples)) == (other, len(proven)) and all(
            np.array_equal(one.input_ids, two.input_ids) and np.array_equal(one.loss_mask, two.loss_mask)
            for one, two in zip(samples, proven, strict=True)
        )

    def _is_plain(self, conversation: Conversation) -> bool:
        if conversation.tools or conversation.documents or conversation.template_kwargs:
            return False
        messages = conversation.messages
        has_system = messages[0].role == "system"
        for turn, message in enumerate(messages, -1 if has_system else 0):
            if turn >= 0 and (message.role != ("assistant" if turn % 2 else "user") or message.context_spans):
                return False
            if turn % 2 and turn > 0 and not self._is_plain_reply(message):
                return False
            if message.reasoning_content or message.tool_calls or message.name or message.tool_call_id:
                return False
            if MARK in message.content:
                return False
        return True

    def _is_plain_reply(self, message: Message) -> bool:
        return message.is_trained and (self.train_reasoning or not has_thoughts(message.content))

    def _find(self, has_system: bool, pairs: int) -> Plan | None:
        key, small = (has_system, pairs), self._find_small(has_system)
        if key not in self._plans:
            self._plans[key] = self._prove(has_system, pairs) if pairs <= small else self._extend(has_system, pairs)
        return self._plans[key]

    def _prove(self, has_system: bool, pairs: int) -> Plan | None:
        """The plan of a few pairs of stand-ins, from ordinary labelling."""
        conversation = _stand_in(has_system, pairs)
        terms = self._watcher.find_terms(conversation.messages)
        if terms is None:
            return None
        self._terms[has_system, pairs] = terms
        try:
            rendered = self._render(conversation)
        except (RowRefused, TemplateRefused):
            return None
        if rendered.how == "composed" or rendered.notes:
            return None
        parts = [self._read(part) for part in rendered.parts]
        if not all(parts):
            return None
        *earlier, last = [part for part in parts if part]
        return Plan(rendered.how, (*(_share(part, last) for part in earlier), last))

    def _read(self, rendered: Rendered) -> Part | None:
        """A labelled text of stand-ins as items of a plan."""
        [encoding] = self.encoder.encode_texts([rendered.text])
        controls = np.flatnonzero(self.encoder.is_control[encoding.ids]).tolist()
        items: list[Item] = []
        begins: list[int] = []  # the character where each item begins
        at = 0
        for index in [*controls, None]:
            start, end = encoding.span(index) if index is not None else (len(rendered.text), len(rendered.text))
            if start > at:
                begins.append(at)
                items.append(_split_stand_ins(rendered, at, start))
            if index is not None:
                begins.append(start)
                items.append(encoding.ids[index])
            at = end
        replies = []
        for span in rendered.spans:
            stop = next((i for i, begin in enumerate(begins) if begin == span.end - len(span.stop)), None)
            item = max(i for i, begin in enumerate(begins) if begin <= span.start)
            lead = rendered.text[begins[item] : span.start]
            if (
                span.context
                or span.start != len(span.prompt)
                or stop is None
                or items[stop] != self.encoder.stop_id(span.stop)
            ):
                return None
            if lead and not _begins(items[item], lead):
                return None
            replies.append(Reply(item, lead, stop))
        return Part(0, tuple(items), tuple(replies))

    def _extend(self, has_system: bool, pairs: int) -> Plan | None:
        """The plan of more pairs: that of a few, with its middle pairs repeated."""
        few = self._small[has_system]
        smaller, small = self._find(has_system, few - 1), self._find(has_system, few)
        if smaller is None or small is None or small.how != smaller.how:
            return None
        if self._terms[has_system, few].largest_number > few - _BEYOND or _repeat(smaller, has_system, 1) != small:
            return None
        return _repeat(small, has_system, pairs - few)

    def _find_small(self, has_system: bool) -> int:
        """Number of pairs to prove one by one: enough to reach the largest number that the template computes with."""
        if has_system not in self._small:
            terms = self._watcher.find_terms(_stand_in(has_system, _SMALL).messages)
            is_far = terms is None or terms.largest_number > _LARGE
            few = _SMALL if is_far or terms is None else max(_SMALL, int(terms.largest_number) + _BEYOND)
            self._small[has_system] = few
        return self._small[has_system]

    def _is_as_rendered(self, planned: Planned, conversation: Conversation) -> bool:
        """Whether the template writes the finished chat as the plan does."""
        try:
            text = self.renderer.render(conversation.messages)
        except TemplateRefused:
            return False
        added = self.encoder.added_text
        return text == "".join([added(item) if isinstance(item, int) else item for item in planned.items[-1]])

    def encode(self, stretches: Iterable[str]) -> dict[str, Ids]:
        """Ids of each stretch, except stretches in which the tokenizer finds control tokens."""
        texts = list(dict.fromkeys(stretches))
        found = self.encoder.encode_arrays(texts)
        if found and self.encoder.is_control[np.concatenate(found)].any():
            return {t: own for t, own in zip(texts, found, strict=True) if not self.encoder.is_control[own].any()}
        return dict(zip(texts, found, strict=True))

    def label(self, planned: Planned, ids: Mapping[str, Ids]) -> list[Sample] | None:
        """The samples of a row; None if it must be labelled without the plan.

        Args:
            ids: of the stretches, from `encode`.
        """
        try:
            pieces = [
                [self._control(item) if isinstance(item, int) else ids[item] for item in items]
                for items in planned.items
            ]
        except KeyError:
            return None  # the tokenizer finds a control token in a text
        whole = np.concatenate(pieces[-1])
        ends = [0, *itertools.accumulate(map(len, pieces[-1]))]
        samples = []
        for part, own in zip(planned.plan.parts, pieces, strict=True):
            shared = ends[part.shared]
            joined = whole if own is pieces[-1] else np.concatenate([whole[:shared], *own])
            starts = list(itertools.accumulate(map(len, own), initial=shared))
            mask = np.zeros(len(joined), dtype=np.uint8)
            for reply in part.replies:
                border = self._border(own[reply.item - part.shared], reply.lead)
                if border is None:
                    return None
                mask[starts[reply.item - part.shared] + border : starts[reply.stop - part.shared] + 1] = 1
            samples.append(Sample(joined, mask))
        return samples

    def _control(self, token: int) -> Ids:
        if token not in self._controls:
            self._controls[token] = np.array([token], dtype=np.uint32)
        return self._controls[token]

    def _border(self, ids: Ids, lead: str) -> int | None:
        """Number of tokens of an item that belong to the prompt; None if they differ from the prompt encoded alone."""
        if not lead:
            return 0
        alone = self.encoder.encode_tail(lead)
        return len(alone) if ids[: len(alone)].tolist() == alone else None


def _stand_in(has_system: bool, pairs: int) -> Conversation:
    roles = ["system"] * has_system + ["user", "assistant"] * pairs
    return Conversation(tuple(Message(role, STAND_IN.format(i)) for i, role in enumerate(roles)))


def _sample_chat(has_system: bool, pairs: int, shift: int) -> Conversation:
    roles = ["system"] * has_system + ["user", "assistant"] * pairs
    return Conversation(tuple(Message(role, _SAMPLES[(i + shift) % len(_SAMPLES)]) for i, role in enumerate(roles)))


def _split_stand_ins(rendered: Rendered, start: int, end: int) -> tuple[Text, ...]:
    texts: list[Text] = []
    at = start
    for place in rendered.places:
        if start <= place.start and place.end <= end and place.start >= at:
            texts += [rendered.text[at : place.start], place.part.turn]
            at = place.end
    return tuple(text for text in (*texts, rendered.text[at:end]) if text != "")


def _begins(item: Item, lead: str) -> bool:
    return not isinstance(item, int) and isinstance(item[0], str) and item[0].startswith(lead)


def _fill(item: Item, contents: Sequence[str]) -> int | str:
    """An item with the contents of the messages in place of their numbers."""
    if isinstance(item, int):
        return item
    return "".join([contents[text] if isinstance(text, int) else text for text in item])


def _share(part: Part, last: Part) -> Part:
    """The part without the leading items that it shares with the last sample."""
    shared = 0
    for one, other in zip(part.items[: part.replies[0].item], last.items, strict=False):
        if one != other:
            break
        shared += 1
    return replace(part, shared=shared, items=part.items[shared:])


def _shift(items: Iterable[Item], turns: int) -> tuple[Item, ...]:
    return tuple(
        item if isinstance(item, int) else tuple(text + turns if isinstance(text, int) else text for text in item)
        for item in items
    )


def _place_of(items: Sequence[Item], turn: int) -> int:
    return next(i for i, item in enumerate(items) if not isinstance(item, int) and turn in item)


def _repeat(plan: Plan, has_system: bool, times: int) -> Plan:
    """A plan with its third pair repeated.

    In the last sample the items from the third question to the fourth are repeated for each added pair; the items after
    them refer to later messages. The samples of the added replies are those of the last but one, shifted.
    """
    last = plan.parts[-1]
    first, second = (_place_of(last.items, has_system + 2 * pair) for pair in (2, 3))
    period = second - first
    items = last.items[:second]
    for number in range(1, times + 1):
        items += _shift(last.items[first:second], 2 * number)
    items += _shift(last.items[second:], 2 * times)
    if len(plan.parts) == 1:
        replies = [*last.replies[:3]]
        replies += [last.replies[2].shift(period * number) for number in range(1, times + 1)]
        replies += [reply.shift(period * times) for reply in last.replies[3:]]
        return Plan(plan.how, (Part(0, items, tuple(replies)),))
    moved = period * times
    parts = [*plan.parts[:-1]]
    model = plan.parts[-2]
    for number in range(1, times + 1):
        shift = period * number
        shifted = tuple(reply.shift(shift) for reply in model.replies)
        parts.append(Part(model.shared + shift, _shift(model.items, 2 * number), shifted))
    end = Part(0, items, tuple(reply.shift(moved) for reply in last.replies))
    return Plan(plan.how, (*parts, end))


def _has_greedy_tokens(tokenizer: Any) -> bool:
    """Whether control tokens strip whitespace around them, so that a stretch encodes differently alone."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return any(token.lstrip or token.rstrip or token.single_word for token in added)
