"""Chats of questions and answers labelled from a plan, for the price of one rendering and one encoding.

A template that drops earlier thoughts wants a rendering of its own for each reply, so a long chat would cost the square
of its length. But such chats are all alike: [system] question answer question answer ... For chats of a few turns, made
of stand-ins, labels are proven as for any other (render.py), and what the template writes around the stand-ins becomes
a plan. The plan of a longer chat repeats its middle. Each control token and each stretch between two of them is an
item of the plan; a stretch is encoded once, however many samples it stands in.

That a plan holds for a row has three grounds. The template was watched while it rendered the stand-ins and the prompts
of their replies, and looked into none of their texts except for what this row's texts do not hold (neutral.py). The
finished chat of the row is rendered by the template itself, and must be the plan's own text. And the first rows of a
run are labelled without a plan too, and compared, and their texts are encoded whole; if anything differs, plans are not
used again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.data.labels import Sample
from tunesmith.data.neutral import STAND_IN, Terms, Watcher
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.render import Rendered, render_chat
from tunesmith.encode.shield import MARK
from tunesmith.rows.conversation import Conversation, Message, RowRefused

_SMALL = 6  # pairs of which plans are proven one by one; plans of more repeat the middle of these
_BEYOND = 3
_LARGE = 16  # a template that holds a larger number may tell long chats from those that are proven
_COMPARED = 4  # rows that are labelled without a plan too
_COMPARED_PAIRS = 12

Text = str | int  # of a stretch: letters of the template, or the number of a message whose content stands there
Item = int | tuple[Text, ...]  # a control token, or a stretch of text between two


@dataclass(frozen=True, slots=True)
class Reply:
    """Where a reply is trained.

    Attributes:
        item: index of the item in which it begins.
        lead: text of the template in that item which still belongs to the prompt.
        stop: index of its stop token's item.
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
    """All samples of a chat; the last one shares nothing, and holds the finished chat."""

    how: str
    parts: tuple[Part, ...]


@dataclass(slots=True)
class Planned:
    """A row on its way.

    Attributes:
        stretches: what has to be encoded.
    """

    plan: Plan
    contents: Sequence[str]
    stretches: list[str] = field(default_factory=list)


class Planner:
    """Makes plans for one encoder, and samples from them."""

    def __init__(self, encoder: Encoder, train_reasoning: bool) -> None:
        self.encoder, self.train_reasoning = encoder, train_reasoning
        self._plans: dict[tuple[bool, int], Plan | None] = {}
        self._compared = self._encoded = 0
        self._terms: dict[tuple[bool, int], Terms] = {}
        self._small: dict[bool, int] = {}
        self._watcher = Watcher(encoder.template) if encoder.template else None
        self.is_trusted = encoder.template is not None and not _has_greedy_tokens(encoder.tokenizer)

    def plan(self, conversation: Conversation) -> Planned | None:
        """The plan of a chat; None where it has to be labelled as any other."""
        if not self.is_trusted or not self._is_plain(conversation):
            return None
        messages = conversation.messages
        has_system = messages[0].role == "system"
        plan = self._find(has_system, len(messages) // 2)
        if plan is None:
            return None
        terms = self._terms[has_system, min(len(messages) // 2, self._small[has_system])]
        if not all(terms.fit(message.content) for message in messages):
            return None
        planned = Planned(plan, [message.content for message in messages])
        for part in plan.parts:
            planned.stretches += [_fill(item, planned.contents) for item in part.items if not isinstance(item, int)]
        return planned if self._is_as_rendered(planned, conversation) else None

    def _is_plain(self, conversation: Conversation) -> bool:
        if conversation.tools or conversation.documents or conversation.template_kwargs:
            return False
        roles = itertools.cycle(("user", "assistant"))
        messages = conversation.messages
        for message in messages[1:] if messages[0].role == "system" else messages:
            if message.role != next(roles) or not message.is_trained or message.context_spans:
                return False
        return not any(
            m.reasoning_content or m.tool_calls or m.name or m.tool_call_id or MARK in m.content for m in messages
        )

    def _find(self, has_system: bool, pairs: int) -> Plan | None:
        key = (has_system, pairs)
        if has_system not in self._small:
            self._small[has_system] = self._pairs_to_prove(has_system)
        small = self._small[has_system]
        if key not in self._plans:
            self._plans[key] = self._prove(has_system, pairs) if pairs <= small else self._extend(has_system, pairs)
        return self._plans[key]

    def _prove(self, has_system: bool, pairs: int) -> Plan | None:
        """The plan of a few pairs of stand-ins, labelled as any other chat."""
        assert self.encoder.template is not None
        conversation = _stand_in(has_system, pairs)
        terms = self._watcher.find_terms(conversation.messages) if self._watcher else None
        if terms is None:
            return None
        self._terms[has_system, pairs] = terms
        try:
            rendered = render_chat(
                conversation, self.encoder.template, self.encoder.stops, "auto", self.train_reasoning
            )
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
        """A labelled text of stand-ins as items."""
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
        """The plan of more pairs: that of a few, with the pairs in its middle repeated."""
        few = self._small[has_system]
        smaller, small = self._find(has_system, few - 1), self._find(has_system, few)
        if smaller is None or small is None or small.how != smaller.how:
            return None
        if self._terms[has_system, few].largest_number > few - _BEYOND or _repeat(smaller, has_system, 1) != small:
            return None
        return _repeat(small, has_system, pairs - few)

    def _pairs_to_prove(self, has_system: bool) -> int:
        """Enough for the template to have come to the largest number that it reckons with."""
        terms = self._watcher.find_terms(_stand_in(has_system, _SMALL).messages) if self._watcher else None
        is_far = terms is None or terms.largest_number > _LARGE
        return _SMALL if is_far or terms is None else max(_SMALL, int(terms.largest_number) + _BEYOND)

    def _is_as_rendered(self, planned: Planned, conversation: Conversation) -> bool:
        """Whether the template itself writes the finished chat as the plan does."""
        template = self.encoder.template
        assert template is not None
        try:
            text = template.render(conversation.messages)
        except TemplateRefused:
            return False
        return text == "".join(self._texts(planned))

    def _texts(self, planned: Planned) -> Iterator[str]:
        for item in planned.plan.parts[-1].items:
            yield self.encoder.added_text(item) if isinstance(item, int) else _fill(item, planned.contents)

    def encode(self, stretches: Iterable[str]) -> dict[str, npt.NDArray[np.uint32]]:
        """Ids of each stretch that is plain text to the tokenizer, not of those in which it finds control tokens."""
        texts = list(dict.fromkeys(stretches))
        ids = {t: np.array(i, dtype=np.uint32) for t, i in zip(texts, self.encoder.encode_ids(texts), strict=True)}
        return {text: found for text, found in ids.items() if not self.encoder.is_control[found].any()}

    def label(self, planned: Planned, ids: Mapping[str, npt.NDArray[np.uint32]]) -> list[Sample] | None:
        """The samples of a row; None where it has to be labelled as any other.

        Args:
            ids: of stretches (`encode`).
        """
        if not all(stretch in ids for stretch in planned.stretches):
            return None  # a text in which the tokenizer finds a control token
        samples = self._assemble(planned, ids)
        if samples is None:
            return None
        if self._encoded < _COMPARED:
            self._encoded += 1
            [whole] = self.encoder.encode_texts(["".join(self._texts(planned))])
            if whole.ids != samples[-1].input_ids.tolist():
                self.is_trusted = False
                return None
        return samples

    def _assemble(self, planned: Planned, ids: Mapping[str, npt.NDArray[np.uint32]]) -> list[Sample] | None:
        last = planned.plan.parts[-1]
        pieces = [self._ids_of(item, planned, ids) for item in last.items]
        whole = np.concatenate(pieces)
        ends = np.cumsum([len(piece) for piece in pieces])
        samples = []
        for part in planned.plan.parts:
            own = pieces if part is last else [self._ids_of(item, planned, ids) for item in part.items]
            shared = int(ends[part.shared - 1]) if part.shared else 0
            joined = whole if part is last else np.concatenate([whole[:shared], *own])
            mask = np.zeros(len(joined), dtype=np.uint8)
            starts = [shared, *(shared + np.cumsum([len(piece) for piece in own]))]
            for reply in part.replies:
                border = self._border(part.items[reply.item - part.shared], reply.lead, planned, ids)
                if border is None:
                    return None
                mask[starts[reply.item - part.shared] + border : starts[reply.stop - part.shared] + 1] = 1
            samples.append(Sample(joined, mask))
        return samples

    def _ids_of(
        self, item: Item, planned: Planned, ids: Mapping[str, npt.NDArray[np.uint32]]
    ) -> npt.NDArray[np.uint32]:
        return np.array([item], dtype=np.uint32) if isinstance(item, int) else ids[_fill(item, planned.contents)]

    def _border(self, item: Item, lead: str, planned: Planned, ids: Mapping[str, npt.NDArray[np.uint32]]) -> int | None:
        """Tokens of an item that belong to the prompt; None if they are not those of the prompt encoded alone."""
        if not lead:
            return 0
        alone = self.encoder.encode_tail(lead)
        assert not isinstance(item, int)
        return len(alone) if ids[_fill(item, planned.contents)][: len(alone)].tolist() == alone else None

    def wants_comparison(self, planned: Planned) -> bool:
        """Whether this row is one of the first, which are labelled without a plan too."""
        if self._compared >= _COMPARED or len(planned.contents) > 2 * _COMPARED_PAIRS:
            return False
        self._compared += 1
        return True

    def compare(self, samples: Sequence[Sample] | None, proven: Sequence[Sample]) -> None:
        """Gives plans up where they do not lead to the samples that labelling without them gives."""
        self.is_trusted &= (
            samples is not None
            and len(samples) == len(proven)
            and all(
                np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.loss_mask, other.loss_mask)
                for one, other in zip(samples, proven, strict=True)
            )
        )


def _stand_in(has_system: bool, pairs: int) -> Conversation:
    roles = ["system"] * has_system + ["user", "assistant"] * pairs
    return Conversation(tuple(Message(role, STAND_IN.format(i)) for i, role in enumerate(roles)))


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


def _fill(item: tuple[Text, ...], contents: Sequence[str]) -> str:
    return "".join([contents[text] if isinstance(text, int) else text for text in item])


def _share(part: Part, last: Part) -> Part:
    """The part without the items that the last sample begins with too."""
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

    In the last sample the items from the third question to the fourth stand once more for each pair; what follows them
    speaks of later messages. The samples of further replies are those of the last but one, moved on.
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
    """Whether control tokens eat blanks around them, so that a stretch does not encode alone as it does there."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return any(token.lstrip or token.rstrip or token.single_word for token in added)
