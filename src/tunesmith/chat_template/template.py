"""Chat templates: messages -> text, as transformers renders them, but with the run's date instead of today's."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.meta

from tunesmith.chat_template.beginnings import GenerationTag, Watched, compile_watched, render_watched
from tunesmith.chat_template.budget import OverLimit
from tunesmith.chat_template.habits import CallForm, Habits, find_habits, refusal_of
from tunesmith.chat_template.program import MAX_SOURCE, build_environment, compile_program, dated, run_template
from tunesmith.chat_template.sandbox import Sandbox
from tunesmith.chat_template.trace import Trace, Turns, trace_rendering
from tunesmith.errors import ModelError
from tunesmith.reading import open_file
from tunesmith.rows.conversation import Message

BUILT_IN = ("chatml", "alpaca")
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_PROVEN = 32  # beginnings that are rendered by themselves before a template is trusted


@lru_cache(maxsize=1)
def environment() -> Sandbox:
    return build_environment(Sandbox, GenerationTag)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with everything that its text depends on.

    Attributes:
        text: the Jinja source; saved with the model as it stands.
        source: where it came from, for the summary.
        special_tokens: bos_token, eos_token ... as the template may print them.
        kwargs: data.template_kwargs.
        date: what `strftime_now` prints.
        is_fallback: the model had no template and got ours.
    """

    text: str
    source: str
    special_tokens: Mapping[str, str]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.datetime = field(default_factory=datetime.datetime.now)
    is_fallback: bool = False

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return compile_program(self.text, environment().from_string, self.source)

    @cached_property
    def _watched(self) -> _Watched:
        made = compile_program(self.text, lambda text: compile_watched(environment(), text), self.source)
        return _Watched(made)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """The text of these messages.

        Args:
            variables: the row's own (chat_template_kwargs, documents), on top of `kwargs`.

        Raises:
            TemplateRefused: with the template's own reason.
        """
        return self.render_turns(self.to_turns(messages), tools, add_generation_prompt, variables)

    def render_turns(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """As `render`, of messages that already have the form that this template reads (`to_turns`)."""
        template = self._compiled
        given = {**self.variables(tools, add_generation_prompt, variables), "messages": list(turns)}
        try:
            return run_template(template, given)[0]
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may divide by zero or recurse without end
            raise refusal_of(error) from None

    def variables(
        self,
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> dict[str, Any]:
        """All that the template reads besides messages."""
        return {
            "tools": list(tools) or None,
            "documents": None,
            "strftime_now": dated(self.date),
            **self.special_tokens,
            **self.kwargs,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }

    def to_turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as this template reads them: arguments of tool calls as objects or as JSON text, for one thing."""
        calls = self.habits.call_form if any(message.tool_calls for message in messages) else CallForm()
        return [calls.apply(message.to_template()) for message in messages]

    @cached_property
    def habits(self) -> Habits:
        """What the template does with reasoning and tool calls, seen on a conversation of our own."""
        return find_habits(self)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of the variables that the template reads."""
        _ = self._compiled  # says what is wrong with it
        return frozenset(jinja2.meta.find_undeclared_variables(environment().parse(self.text)))

    def render_beginnings(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> Beginnings:
        """The text of these messages, and of each beginning of them.

        Raises:
            TemplateRefused: with the template's own reason.
        """
        turns = self.to_turns(messages)
        watched = self._watched
        try:
            seen = render_watched(watched.template, turns, self.variables(tools, False, variables))
        except MemoryError:
            raise
        except OverLimit as error:
            raise refusal_of(error) from None
        except Exception:  # then it is rendered as it always is, and that says what is wrong
            seen = Watched(self.render_turns(turns, tools, False, variables), {}, ())
        return Beginnings(self, turns, tools, variables, seen)


@dataclass
class _Watched:
    """A template that marks where turns end.

    Attributes:
        tails: what it writes behind the last turn, by add_generation_prompt, once seen.
        proven: beginnings that were rendered by themselves too and came out alike.
    """

    template: jinja2.Template
    tails: dict[bool, str] = field(default_factory=dict)
    proven: int = 0
    is_trusted: bool = True


class Beginnings:
    """The renderings of a chat's first turns; `text` is that of all, `marks` its {% generation %} blocks."""

    def __init__(
        self,
        template: ChatTemplate,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        seen: Watched,
    ) -> None:
        self.text, self.marks, self._ends = seen.text, seen.marks, seen.ends
        self.turns, self.tools = turns, tools
        self._template, self._variables = template, variables

    def until(self, count: int, add_generation_prompt: bool = False) -> str:
        """What the template writes for the first `count` messages.

        The first of them are rendered by themselves too, and compared: a template that fools us is never trusted again.
        """
        if count == len(self.turns) and not add_generation_prompt:
            return self.text
        watched, end = self._template._watched, self._ends.get(count)
        if end is None or not watched.is_trusted or self._variables:  # a row's own variables may decide what follows
            return self._render(count, add_generation_prompt)
        tail = watched.tails.get(add_generation_prompt)
        if tail is not None and watched.proven >= _PROVEN:
            return self.text[:end] + tail
        text = self._render(count, add_generation_prompt)
        tail = watched.tails.setdefault(add_generation_prompt, text[end:])
        if text == self.text[:end] + tail:
            watched.proven += 1
        else:
            watched.is_trusted = False
        return text

    def _render(self, count: int, add_generation_prompt: bool) -> str:
        return self.render(self.turns[:count], self.tools, add_generation_prompt)

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        documents: Sequence[Any] = (),
    ) -> str:
        """Other turns, tools or documents with this chat's variables."""
        variables = {**self._variables, "documents": list(documents)} if documents else self._variables
        return self._template.render_turns(turns, tools, add_generation_prompt, variables)

    def trace(self, removed: frozenset[str], count: int | None = None, add_generation_prompt: bool = False) -> Trace:
        """Where each part of the first `count` messages stands in what the template writes for them."""

        def render(turns: Turns, tools: Turns, documents: Sequence[Any]) -> str:
            return self.render(turns, tools, add_generation_prompt, documents)

        count = len(self.turns) if count is None else count
        text = self.until(count, add_generation_prompt)
        documents = self._variables.get("documents") or ()
        return trace_rendering(text, self.turns[:count], self.tools, render, removed, documents)


def find_template(
    choice: str | None, own: Any, special_tokens: Mapping[str, str], add_bos: bool
) -> tuple[str, str, bool]:
    """The text, source and is_fallback of the template that a run uses.

    Args:
        choice: data.chat_template: a .jinja path, a built-in name, or None for the model's own.
        own: what the tokenizer carries, if anything.
        add_bos: whether the tokenizer starts its texts with BOS; our built-in templates then do too.
    """
    if choice is None:
        if own:
            return _own_text(own), "the model's own", False
        return load_built_in("alpaca", add_bos), "alpaca", True
    if choice in BUILT_IN:
        return load_built_in(choice, add_bos), choice, False
    path = Path(choice).expanduser()
    if not path.exists():
        raise ModelError(
            f"data.chat_template {choice}: no such file, and no built-in template of that name "
            f"({', '.join(BUILT_IN)}, none)."
        )
    try:
        with open_file(path) as file:
            text = file.read(4 * MAX_SOURCE + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ModelError(f"data.chat_template {choice}: cannot be read: {reason}. Give a .jinja file.") from None
    return text, str(path), False


def _own_text(own: Any) -> str:
    """Of what tokenizer_config.json holds as chat_template: one text, or several by name.

    Raises:
        ModelError: it is something else, or leaves open which one is meant.
    """
    text = own
    if isinstance(own, Mapping):
        if len(own) > 1 and "default" not in own:
            names = ", ".join(sorted(map(str, own)))
            raise ModelError(
                f"the model has several chat templates ({names}) and no default. Save the right one as a .jinja file "
                "and name it with --data.chat_template."
            )
        text = own["default"] if "default" in own else next(iter(own.values()))
    if not isinstance(text, str):
        raise ModelError(
            f"the model's chat_template (tokenizer_config.json) is of type {type(text).__name__}, not a text. Correct "
            "it, or name a template with --data.chat_template."
        )
    return text


def require_template_file(folder: str) -> None:
    """A chat_template.jinja that transformers would pass over without a word.

    Raises:
        ModelError: it stands there and is no file.
    """
    path = Path(folder) / "chat_template.jinja"
    if os.path.lexists(path) and not path.is_file():
        raise ModelError(f"{path}: is a folder, a pipe or a broken link, not a file. Put the template's text there.")


def load_built_in(name: str, add_bos: bool) -> str:
    text = resources.files("tunesmith").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token }}" + text if add_bos else text
