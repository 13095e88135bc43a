"""How a model's chat template writes the parts of a reply: reasoning, content and tool calls.

Found by rendering probe conversations whose names, keys and values are words that nothing else contains. The text
between them is what the template itself writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.chat_template.habits import THINK_TAGS, TemplateRefused, shared_length
from tunesmith.chat_template.template import Renderer

_ASKED, _THOUGHT, _SAID = "tsasked", "tsthought", "tssaid"
_ONE, _TWO, _KEY, _OTHER, _VALUE, _NUMBER = "tsfone", "tsftwo", "tskeyone", "tskeytwo", "tsvalue", 70707
_IDS = ("tsmith001", "tsmith002")  # Mistral's templates require nine letters and digits
_PLAIN, _FULL, _EXTRA = {_KEY: _VALUE}, {_KEY: _VALUE, _OTHER: _NUMBER}, {_OTHER: _NUMBER}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {
                    _KEY: {"type": "string", "description": ""},
                    _OTHER: {"type": "integer", "description": ""},
                },
            },
        },
    }
    for name in (_ONE, _TWO)
]


@dataclass(frozen=True, slots=True)
class Entries:
    """Arguments written one by one, as in <parameter=KEY>VALUE</parameter>.

    Attributes:
        before: text before a key.
        middle: text between a key and its value.
        after: text after a value.
        between: further text between two arguments.
        quote: text around a value that is text; '"' for JSON.
    """

    before: str
    middle: str
    after: str
    between: str
    quote: str


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a template writes tool calls.

    Attributes:
        opening: text before the first call, besides `head`.
        head: text before the name in each call.
        middle: text between the name and the arguments.
        tail: text after each call.
        between: text between two calls, besides `tail` and `head`.
        closing: text after the last call.
        entries: how arguments are written if not as one JSON object.
        keys: the keys of name and arguments where a call is a JSON object.
        is_list: whether these objects are in one JSON array.
        path: keys from that object to the object with name and arguments.
    """

    opening: str
    head: str
    middle: str
    tail: str
    between: str
    closing: str
    entries: Entries | None = None
    keys: tuple[str, str] | None = None
    is_list: bool = False
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplyShapes:
    """How a template writes replies.

    Attributes:
        think_open: text before reasoning; None if the template writes no reasoning.
        think_close: text after it.
        begins_inside: whether the generation prompt ends within the reasoning.
        content_opens: texts before content (gpt-oss' channels).
        content_closes: texts between content and a call, besides those of the call.
        calls: None if the template writes no tool calls, or in a way that is not understood.
    """

    think_open: str | None = None
    think_close: str = ""
    begins_inside: bool = False
    content_opens: tuple[str, ...] = ()
    content_closes: tuple[str, ...] = ()
    calls: CallShape | None = None


def find_reply_shapes(renderer: Renderer, stops: Sequence[str]) -> ReplyShapes:
    """The shapes of a template's replies.

    Args:
        stops: texts of the tokens that end a reply.
    """
    probe = _Probe(renderer, tuple(filter(None, stops)))
    said = probe.reply(_turn(_SAID))
    lead = said.partition(_SAID)[0] if said and _SAID in said else ""
    think_open, think_close, begins_inside = _find_thinking(probe, lead)
    if think_open is not None and think_close.strip() and think_close.strip() in lead:
        lead = lead[lead.rindex(think_close.strip()) + len(think_close.strip()) :].lstrip()
    calls, opens, closes = _find_calls(probe)
    found = [one for one in dict.fromkeys([lead, *opens]) if one.strip() and one != think_open]
    if lead and not lead.strip():
        found.append(lead)
    return ReplyShapes(think_open, think_close, begins_inside, tuple(found), closes, calls)


class _Probe:
    """Renders probe conversations."""

    def __init__(self, renderer: Renderer, stops: tuple[str, ...]) -> None:
        self._renderer, self._stops = renderer, stops
        self.prompt = self._render([_user()], ask=True) or ""
        said = self._render([_user(), _turn(_SAID)])
        self._start = len(self.prompt) if said is None else shared_length(said, self.prompt)

    def reply(self, turn: Mapping[str, Any]) -> str | None:
        """What a model writes for a turn, without the stop token; None if the template refuses it."""
        text = self._render([_user(), self._renderer.habits.call_form.apply(dict(turn))])
        if text is None:
            return None
        start = min(self._start, shared_length(text, self.prompt))
        if start < len(self.prompt):  # the template begins finished turns differently
            rest = text[start:]
            longest = min(len(rest), len(self.prompt))
            start += next((size for size in range(longest, 0, -1) if self.prompt.endswith(rest[:size])), 0)
        rest = text[start:]
        behind = max((rest.rfind(word) + len(word) for word in _words_in(rest)), default=0)
        ends = [place for stop in self._stops if (place := rest.find(stop, behind)) >= 0]
        return rest[: min(ends, default=len(rest))]

    def _render(self, turns: Sequence[Mapping[str, Any]], ask: bool = False) -> str | None:
        tools = _TOOLS if self._renderer.habits.writes_calls else []
        try:
            return self._renderer.render_turns(turns, tools, ask)
        except TemplateRefused:
            return None


def _words_in(text: str) -> Iterator[str]:
    return (word for word in (_SAID, _THOUGHT, _ONE, _TWO, _KEY, _OTHER, _VALUE, str(_NUMBER)) if word in text)


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _ASKED}


def _turn(content: str, *calls: tuple[str, Mapping[str, Any]], thought: bool = False) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        turn["reasoning_content"] = _THOUGHT
    if calls:
        turn["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            for call_id, (name, arguments) in zip(_IDS, calls, strict=False)
        ]
    return turn


def _find_thinking(probe: _Probe, lead: str) -> tuple[str | None, str, bool]:
    """Text before reasoning (None: it is not written), text after it, and whether a reply begins inside."""
    prompt = probe.prompt.rstrip()
    opened = next(((first, last) for first, last in THINK_TAGS if prompt.endswith(first)), None)
    thought = probe.reply(_turn(_SAID, thought=True)) or ""
    before, found, behind = thought.partition(_THOUGHT)
    after, said, _ = behind.partition(_SAID)
    if not (found and said and after.strip()):
        return ("", opened[1], True) if opened else (None, "", False)
    if lead.strip() and after.endswith(lead) and after != lead:
        after = after[: -len(lead)]
    return before, after, opened is not None


def _find_calls(probe: _Probe) -> tuple[CallShape | None, list[str], tuple[str, ...]]:
    """The shape of calls, and texts that open and close content before a call."""
    plain = probe.reply(_turn("", (_ONE, _PLAIN)))
    if plain is None or not all(word in plain for word in (_ONE, _KEY, _VALUE)):
        return None, [], ()
    plain = _without_thinking(plain, probe)
    both = probe.reply(_turn("", (_ONE, _PLAIN), (_TWO, _EXTRA)))
    both = _without_thinking(both, probe) if both and _TWO in both and str(_NUMBER) in both else None
    shape = _json_shape(plain, both) or _entries_shape(plain, both, probe)
    if shape is None:
        return None, [], ()
    worded = probe.reply(_turn(_SAID, (_ONE, _PLAIN))) or ""
    lead, said, behind = _without_thinking(worded, probe).partition(_SAID)
    start = plain[: plain.index(_ONE)]
    until = behind.partition(_ONE)[0]
    if not said or _ONE not in behind or not until.rstrip().endswith(start.strip()):
        return shape, [], ()
    closes = until[: len(until.rstrip()) - len(start.strip())] if start.strip() else ""
    return shape, [lead], ((closes,) if closes.strip() else ())


def _without_thinking(reply: str, probe: _Probe) -> str:
    """A reply without the empty reasoning block that some templates write before it."""
    _, close, _ = _find_thinking(probe, "")
    head, found, rest = reply.partition(close.strip()) if close.strip() else (reply, "", "")
    if not found or any(word in head for word in (_ONE, _SAID)):
        return reply
    gap = close[len(close.rstrip()) :]
    return rest.removeprefix(gap) if rest.startswith(gap) else rest.lstrip()


def _split(before: str, between: str | None, behind: str) -> tuple[str, str, str, str, str]:
    """Opening, head, tail, separator and closing of calls.

    Args:
        before: the text before the first call; it ends in the head.
        between: the text between two calls: tail, separator, head; None if only one call can be written.
        behind: the text after the last call: tail, closing.
    """
    if between is None:
        return "", before, behind, "", ""
    head = _shared_end(before, between)
    tail = min(shared_length(between, behind), len(between) - head)
    opening, closing = before[: len(before) - head], behind[tail:]
    if any(_words_in(closing)):  # the template writes more than the reply here
        closing = ""
    return opening, before[len(before) - head :], between[:tail], between[tail : len(between) - head], closing


def _shared_end(one: str, other: str) -> int:
    return shared_length(one[::-1], other[::-1])


def _json_shape(plain: str, both: str | None) -> CallShape | None:
    """Calls whose arguments are one JSON object."""
    place = plain.index(_ONE)
    span = _find_json(plain, 0, _PLAIN)
    if span is None:
        return None
    second = _find_json(both, 0, _EXTRA) if both else None
    outer = _find_outer(plain, place, span)
    if outer is None and span[1] <= place:
        return None
    if outer is None:
        start, end = place, span[1]
        starts_second = both.index(_TWO) if both else 0
    else:
        start, end, keys, path = outer
        found = _find_outer(both, both.index(_TWO), second) if both and second else None
        if _is_list(plain, start):
            return _list_shape(plain, outer, place, span)
        starts_second = found[0] if found else 0
        if both and second and found:
            second = (second[0], found[1])
    between = behind = None
    if both and second:
        first = _find_json(both, 0, _PLAIN)
        size = end - span[1]
        between, behind = (both[first[1] + size : starts_second], both[second[1] :]) if first else (None, None)
    opening, head, tail, separator, closing = _split(plain[:start], between, behind or plain[end:])
    middle = plain[place + len(_ONE) : span[0]]  # empty if the arguments come first
    if outer is None:
        return CallShape(opening, head, middle, tail, separator, closing)
    head += plain[start:place] if middle else "{"
    return CallShape(opening, head, middle, tail, separator, closing, None, keys, False, path)


def _list_shape(
    plain: str, outer: tuple[int, int, tuple[str, str], tuple[str, ...]], place: int, span: tuple[int, int]
) -> CallShape:
    start, end, keys, path = outer
    bracket = plain.rindex("[", 0, start)
    close = plain.index("]", end)
    opening, middle = plain[: bracket + 1], plain[place + len(_ONE) : span[0]]
    return CallShape(opening, plain[start:place], middle, "", ",", plain[close:], None, keys, True, path)


def _is_list(text: str, start: int) -> bool:
    """Whether the object that starts here is the first one of a JSON array."""
    before = text[:start].rstrip()
    if not before.endswith("["):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text, len(before) - 1)
    except ValueError:
        return False
    return isinstance(value, list)


def _find_json(text: str, start: int, wanted: Mapping[str, Any]) -> tuple[int, int] | None:
    """Characters of the first JSON object after `start` that has these contents."""
    place = text.find("{", start)
    while place >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except ValueError:
            value, end = None, 0
        if value == wanted:
            return place, end
        place = text.find("{", place + 1)
    return None


def _find_outer(
    text: str, name: int, arguments: tuple[int, int] | None
) -> tuple[int, int, tuple[str, str], tuple[str, ...]] | None:
    """The JSON object of a call: its characters, the keys of name and arguments, and the path to the object of both."""
    found = None
    place = text.rfind("{", 0, name)
    while place >= 0 and arguments is not None:
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except ValueError:
            break
        if end >= arguments[1] and (keys := _keys_of(value)):
            found = (place, end, *keys)
        place = text.rfind("{", 0, place)
    return found


def _keys_of(value: Any) -> tuple[tuple[str, str], tuple[str, ...]] | None:
    if not isinstance(value, dict):
        return None
    name = next((key for key, below in value.items() if below in (_ONE, _TWO)), None)
    arguments = next((key for key, below in value.items() if below in (_PLAIN, _EXTRA)), None)
    if name and arguments:
        return (name, arguments), ()
    for key, below in value.items():
        if found := _keys_of(below):
            return found[0], (key, *found[1])
    return None


def _entries_shape(plain: str, both: str | None, probe: _Probe) -> CallShape | None:
    """Calls whose arguments are written one by one."""
    empty, full = (probe.reply(_turn("", (_ONE, arguments))) for arguments in ({}, _FULL))
    if empty is None or full is None or not all(word in full for word in (_ONE, _KEY, _VALUE, _OTHER, str(_NUMBER))):
        return None
    empty, full = _without_thinking(empty, probe), _without_thinking(full, probe)
    name = plain.index(_ONE)
    key = plain.find(_KEY, name)
    value = plain.find(_VALUE, key)
    if min(key, value) < 0:
        return None
    number_middle = full[full.index(_OTHER) + len(_OTHER) : full.index(str(_NUMBER))]
    middle = plain[key + len(_KEY) : value]
    quote = middle.removeprefix(number_middle) if middle.startswith(number_middle) else ""
    end = value + len(_VALUE)
    if quote and not plain.startswith(quote, end):
        return None
    end += len(quote)
    lead = plain[name + len(_ONE) : key]  # what follows the name, and what precedes a key
    join = full[full.index(_VALUE) + len(_VALUE) + len(quote) : full.index(_OTHER)]
    rest, bare = plain[end:], empty[empty.index(_ONE) + len(_ONE) :]
    cut = _cut(lead, shared_length(bare, lead), len(lead) - _shared_end(lead, join))
    if cut is None:
        return None
    before = lead[cut:]
    after = join[: min(shared_length(join, rest), len(join) - len(before))]
    entries = Entries(before, number_middle, after, join[len(after) : len(join) - len(before)], quote)
    between = behind = None
    if both:
        stop = both.index(_VALUE) + len(_VALUE) + len(quote) + len(after)
        between = both[stop : both.index(_TWO)]
        behind = both[both.index(str(_NUMBER)) + len(str(_NUMBER)) + len(after) :]
    opening, head, tail, separator, closing = _split(plain[:name], between, behind or rest[len(after) :])
    return CallShape(opening, head, lead[:cut], tail, separator, closing, entries)


def _cut(text: str, most: int, least: int) -> int | None:
    """Where a text is cut within these bounds: after white space or a bracket if there is such a place."""
    places = range(most, least - 1, -1)
    good = (place for place in places if place == 0 or text[place - 1].isspace() or text[place - 1] in ">)]}([{")
    return next(good, next(iter(places), None))
