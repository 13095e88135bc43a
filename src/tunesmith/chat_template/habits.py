"""Find out how a chat template writes reasoning and tool calls, by rendering probe chats.

Templates differ in what they read: some concatenate a call's arguments as JSON text, most take an object; some never
write reasoning. This cannot be read reliably from the template's source, so it is tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes

from tunesmith.chat_template.budget import OverLimit
from tunesmith.chat_template.program import cut
from tunesmith.chat_template.watched import GenerationTag
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message
from tunesmith.sources.jsontext import load_json

if TYPE_CHECKING:
    from tunesmith.chat_template.template import Renderer

THINK = "<think>"
THINK_TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""Opening and closing tags of reasoning in the templates of known model families."""
_EMPTY = re.compile("(?:" + "|".join(rf"{re.escape(a)}\s*{re.escape(b)}" for a, b in THINK_TAGS) + r")\s*\Z")
_FLAG = re.compile(r"/\w+")  # anything else that a template removes from a text counts as lost
_ASKED, _THOUGHT, _SAID, _TOOL, _KEY, _VALUE, _RESULT, _END, _PARAMETER = (
    "tsasked", "tsthought", "tssaid", "tsprobe", "tskey", "tsvalue", "tsresult", "tsend", "tsparameter",
)  # fmt: skip
_ID = "tsmith001"  # Mistral's templates require nine letters and digits
PROBE_WORDS = (_TOOL, _KEY, _VALUE)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "",
        "parameters": {"type": "object", "properties": {_PARAMETER: {"type": "string", "description": ""}}},
    },
}


class TemplateRefused(Exception):
    """The template rejects these messages (raise_exception, a missing key)."""


class TemplateOverLimit(TemplateRefused):
    """The template computes or writes too much for these messages."""


def refusal_of(error: Exception) -> TemplateRefused:
    """The exception of a template's program as a TemplateRefused."""
    text = cut(str(error) or type(error).__name__)
    return TemplateOverLimit(text) if isinstance(error, OverLimit) else TemplateRefused(text)


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form in which a template expects turns with tool calls.

    Attributes:
        arguments_as_text: a call's arguments are JSON text (DeepSeek-V3 concatenates them), not an object.
        empty_is_none: empty content next to a call is null.
    """

    arguments_as_text: bool = False
    empty_is_none: bool = False

    def apply(self, turn: dict[str, Any]) -> dict[str, Any]:
        if "reasoning_content" in turn:
            turn = {**turn, "thinking": turn["reasoning_content"]}  # the name that gpt-oss reads
        if not turn.get("tool_calls"):
            return turn
        calls = [self._apply_to_call(call) for call in turn["tool_calls"]]
        content = None if self.empty_is_none and not turn["content"] else turn["content"]
        return {**turn, "tool_calls": calls, "content": content}

    def with_arguments(self, message: Message) -> Message:
        """The message with arguments that are JSON text as the object that `apply` makes of them.

        Done before control text is marked: JSON escapes (backslash u003c for <) hide its spelling.
        """
        if not any(isinstance(call["function"]["arguments"], str) for call in message.tool_calls):
            return message
        return replace(message, tool_calls=tuple(self._apply_to_call(call) for call in message.tool_calls))

    def _apply_to_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            arguments = _object_of(arguments)
        return {**call, "function": {**function, "arguments": arguments}}


def _object_of(text: str) -> Any:
    try:
        value = load_json(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text


@dataclass(frozen=True, slots=True)
class Habits:
    """How a template writes reasoning and tool calls.

    Attributes:
        call_form: the form in which it writes tool calls in full.
        writes_calls: whether there is such a form.
        needs_ids: whether it rejects a call without an id.
        writes_reasoning: whether it writes the reasoning_content of the last turn of a chat.
        closing: what it writes between the reasoning and what follows (words or a call); None if unknown.
        opens_thinking: whether its generation prompt ends in <think>, so that a reply begins with reasoning.
        removed: texts that it removes from the content (SmolLM3's /no_think).
    """

    call_form: CallForm
    writes_calls: bool
    needs_ids: bool
    writes_reasoning: bool
    closing: str | None
    opens_thinking: bool
    removed: frozenset[str]


def find_habits(renderer: Renderer) -> Habits:
    form = _find_call_form(renderer)
    closing = _find_closing(renderer, form)
    asked = _try(renderer, [_user()], ask=True) or ""
    return Habits(
        call_form=form or CallForm(),
        writes_calls=form is not None,
        needs_ids=form is not None and _needs_ids(renderer, form),
        writes_reasoning=_THOUGHT in _thoughtful(renderer, _reply(_SAID, thought=True)),
        closing=closing,
        opens_thinking=asked.rstrip().endswith(THINK),
        removed=frozenset(_removed(renderer)),
    )


@dataclass(frozen=True, slots=True)
class EmptyThink:
    """The empty think block that a template writes before a reply without reasoning.

    Attributes:
        block: its text, with the white space behind it.
        before_call: what the template writes between the block and the first part of a tool call; None if unknown.
    """

    block: str
    before_call: str | None


def find_empty_think(renderer: Renderer) -> EmptyThink | None:
    """The empty think block of a template, found by rendering probe chats; None if it writes none."""
    written, said, _ = (_try(renderer, [_user(), _reply(_SAID)]) or "").partition(_SAID)
    found = _EMPTY.search(written)
    if not said or found is None:
        return None
    block = found[0]
    turns = [_user(), renderer.habits.call_form.apply(_reply("", call=True))]
    text = (_try(renderer, turns, tools=True) or "").rpartition(block)[2]
    first = min((text.index(word) for word in PROBE_WORDS if word in text), default=None)
    is_whole = first is not None and all(word in text for word in PROBE_WORDS)
    return EmptyThink(block, text[:first] if is_whole else None)


def probe_call() -> list[Message]:
    """A question and the tool call that answers it; `PROBE_WORDS` are the words of the call."""
    calls = _reply("", call=True)["tool_calls"]
    return [Message("user", _ASKED), Message("assistant", "", tool_calls=tuple(calls))]


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _ASKED}


def _reply(content: str, thought: bool = False, call: bool = False) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        turn["reasoning_content"] = _THOUGHT
    if call:
        function = {"name": _TOOL, "arguments": {_KEY: _VALUE}}
        turn["tool_calls"] = [{"id": _ID, "type": "function", "function": function}]
    return turn


def _try(renderer: Renderer, turns: Sequence[Mapping[str, Any]], tools: bool = False, ask: bool = False) -> str | None:
    try:
        return renderer.render_turns(turns, [PROBE_TOOL] if tools else [], ask)
    except TemplateOverLimit as error:  # every real chat is longer than these
        raise ModelError(
            f"chat template {renderer.template.source}: {error}, in a chat of {len(turns)} short messages. Correct the "
            "template or name another one with --data.chat_template.",
            code="template-over-limit",
        ) from None
    except TemplateRefused:
        return None


def _find_call_form(renderer: Renderer) -> CallForm | None:
    """The first form in which a call is written in full, neither as a Python repr nor as JSON text inside JSON."""
    result = {"role": "tool", "content": _RESULT, "name": _TOOL, "tool_call_id": _ID}
    for empty_is_none in (False, True):
        for as_text in (False, True):
            form = CallForm(as_text, empty_is_none)
            call = form.apply(_reply("", call=True))
            for turns in ([_user(), call, result, _reply(_END)], [_user(), call]):
                text = _try(renderer, turns, tools=True)
                if text is not None and _is_whole_call(text):
                    return form
    return None


def _needs_ids(renderer: Renderer, form: CallForm) -> bool:
    call = form.apply(_reply("", call=True))
    without = {**call, "tool_calls": [{key: value for key, value in call["tool_calls"][0].items() if key != "id"}]}
    with_id, without_id = (_try(renderer, [_user(), turn], tools=True) for turn in (call, without))
    return with_id is not None and (without_id is None or not _is_whole_call(without_id))


def _is_whole_call(text: str) -> bool:
    odd = (f"{{'{_KEY}'", f'\\"{_KEY}', f"{_KEY}': '{_VALUE}", "None")
    return all(word in text for word in (_TOOL, _KEY, _VALUE)) and not any(word in text for word in odd)


def _thoughtful(renderer: Renderer, turn: Mapping[str, Any], tools: bool = False) -> str:
    return _try(renderer, [_user(), CallForm().apply(dict(turn))], tools) or ""


def _find_closing(renderer: Renderer, form: CallForm | None) -> str | None:
    """The text after reasoning, whatever follows: the common start of what precedes words and what precedes a call."""
    text = _thoughtful(renderer, _reply(_SAID, thought=True))
    _, thought, behind = text.partition(_THOUGHT)
    if not thought or _SAID not in behind:
        return None
    before_words = behind.partition(_SAID)[0]
    if form is None:
        return before_words
    turns = [_user(), form.apply(_reply("", thought=True, call=True))]
    _, thought, behind = (_try(renderer, turns, tools=True) or "").partition(_THOUGHT)
    before_call, called, _ = behind.partition(_TOOL)
    if not (thought and called):
        return before_words
    return before_words[: shared_length(before_words, before_call)]


def shared_length(one: str, other: str) -> int:
    """Length of the common prefix of two texts, by bisection, since usually one is a prefix of the other."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def _removed(renderer: Renderer) -> Iterator[str]:
    """Flags for the template itself that it removes from the content."""
    for name, texts in find_text_calls(renderer.template.text):
        if name == "replace" and len(texts) == 2 and _FLAG.fullmatch(texts[0]) and texts[1] == "":
            yield texts[0]


def find_text_calls(source: str) -> Iterator[tuple[str, list[str]]]:
    """Name and constant texts of every method call and filter in a template's source."""
    try:
        tree = jinja2.Environment(extensions=[GenerationTag, "jinja2.ext.loopcontrols"]).parse(source)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return
    for filtered in tree.find_all(nodes.Filter):
        yield filtered.name, _constant_texts(filtered.args)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield call.node.attr, _constant_texts(call.args)


def _constant_texts(arguments: Sequence[nodes.Expr]) -> list[str]:
    return [arg.value for arg in arguments if isinstance(arg, nodes.Const) and isinstance(arg.value, str)]
