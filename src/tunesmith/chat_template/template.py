"""Render messages with a chat template as transformers does, with the date of the request."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.meta

from tunesmith.chat_template.beginnings import Beginnings, Tails, find_tails
from tunesmith.chat_template.budget import OverLimit
from tunesmith.chat_template.habits import CallForm, Habits, find_habits, refusal_of
from tunesmith.chat_template.program import MAX_SOURCE, build_environment, compile_program, dated, run_template
from tunesmith.chat_template.sandbox import Helper, Sandbox
from tunesmith.chat_template.watched import GenerationTag, Watched, compile_watched, render_watched
from tunesmith.errors import ModelError
from tunesmith.reading import open_file
from tunesmith.rows.conversation import Message

BUILT_IN = ("chatml", "alpaca")
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_MAX_HABITS = 64  # settings whose habits are cached; a server sees many
_NO_CALLS = CallForm()


@lru_cache(maxsize=1)
def environment() -> Sandbox:
    return build_environment(Sandbox, GenerationTag)


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """Settings of a request for a chat template, besides its messages and tools.

    Attributes:
        date: the date that `strftime_now` prints.
        variables: variables of the template, as data.template_kwargs sets them.
    """

    date: datetime.datetime
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for settings with the same variables and day, under which a template renders messages alike."""
        return json.dumps([self.date.date().isoformat(), self.variables], sort_keys=True, default=repr)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template's program.

    Attributes:
        text: the Jinja source; saved with the model unchanged.
        source: its origin, for the summary.
        special_tokens: bos_token, eos_token ... as the template may print them.
        is_fallback: the model had no template and a built-in one is used.
    """

    text: str
    source: str
    special_tokens: Mapping[str, str]
    is_fallback: bool = False
    _habits: dict[str, Habits] = field(default_factory=dict, init=False, repr=False)

    def with_settings(self, settings: RenderSettings) -> Renderer:
        return Renderer(self, settings)

    @cached_property
    def program(self) -> jinja2.Template:
        return compile_program(self.text, environment().from_string, self.source)

    @cached_property
    def watched_program(self) -> jinja2.Template:
        """The program with a mark at the end of each turn."""
        return compile_program(self.text, lambda text: compile_watched(environment(), text), self.source)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of the variables that the template reads."""
        _ = self.program  # raises an error for a broken template
        return frozenset(jinja2.meta.find_undeclared_variables(environment().parse(self.text)))

    def habits_under(self, settings: RenderSettings) -> Habits:
        """How the template writes reasoning and tool calls, found once per settings by rendering probe chats."""
        if settings.key not in self._habits:
            while len(self._habits) >= _MAX_HABITS:
                self._habits.pop(next(iter(self._habits)))
            midnight = settings.date.replace(hour=0, minute=0, second=0, microsecond=0)
            self._habits[settings.key] = find_habits(Renderer(self, replace(settings, date=midnight)))
        return self._habits[settings.key]


@dataclass(frozen=True, eq=False)
class Renderer:
    """A chat template under the settings of a request: messages -> text."""

    template: ChatTemplate
    settings: RenderSettings

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """The text of these messages.

        Args:
            variables: of the row (chat_template_kwargs, documents); they override those of the settings.

        Raises:
            TemplateRefused: with the template's reason.
        """
        return self.render_turns(self.to_turns(messages), tools, add_generation_prompt, variables)

    def render_turns(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """As `render`, for messages already in the form that this template reads (`to_turns`)."""
        program = self.template.program
        given = {**self.variables(tools, add_generation_prompt, variables), "messages": list(turns)}
        try:
            return run_template(program, given)[0]
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
        """All variables that the template may read, besides the messages."""
        return {
            "tools": list(tools) or None,
            "documents": None,
            "strftime_now": self._strftime_now,
            **self.template.special_tokens,
            **self.settings.variables,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }

    @cached_property
    def _strftime_now(self) -> Helper:
        return dated(self.settings.date)

    def to_turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages in the form that this template reads (arguments of tool calls as objects or as JSON text)."""
        calls = self.habits.call_form if any(message.tool_calls for message in messages) else _NO_CALLS
        return [calls.apply(message.to_template()) for message in messages]

    @cached_property
    def habits(self) -> Habits:
        return self.template.habits_under(self.settings)

    @cached_property
    def tails(self) -> Tails:
        """What the template writes after the last turn, found with stand-in chats, so the same for every row."""
        return find_tails(self)

    def watch(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> Watched:
        """The text of all turns, and the end of each turn in it.

        Raises:
            TemplateRefused: with the template's reason.
        """
        program = self.template.watched_program
        try:
            return render_watched(program, turns, self.variables(tools, False, variables))
        except MemoryError:
            raise
        except OverLimit as error:
            raise refusal_of(error) from None
        except Exception:  # the ordinary rendering below raises the error to show
            return Watched(self.render_turns(turns, tools, False, variables), {}, ())

    def render_beginnings(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> Beginnings:
        """The text of these messages, and of each beginning of them.

        Raises:
            TemplateRefused: with the template's reason.
        """
        turns = self.to_turns(messages)
        return Beginnings(self, turns, tools, variables, self.watch(turns, tools, variables))


def find_template(
    choice: str | None, own: Any, special_tokens: Mapping[str, str], add_bos: bool
) -> tuple[str, str, bool]:
    """The text, source and is_fallback of the template that a run uses.

    Args:
        choice: data.chat_template: a .jinja path, a built-in name, or None for the model's own.
        own: the chat template of the tokenizer, if it has one.
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
            f"({', '.join(BUILT_IN)}, none).",
            code="template-not-found",
        )
    try:
        with open_file(path) as file:
            text = file.read(4 * MAX_SOURCE + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ModelError(
            f"data.chat_template {choice}: cannot be read: {reason}. Give a .jinja file.", code="template-unreadable"
        ) from None
    return text, str(path), False


def _own_text(own: Any) -> str:
    """The chat template of tokenizer_config.json, which may hold one text or several by name.

    Raises:
        ModelError: it is something else, or has several texts and no default.
    """
    text = own
    if isinstance(own, Mapping):
        if len(own) > 1 and "default" not in own:
            names = ", ".join(sorted(map(str, own)))
            raise ModelError(
                f"the model has several chat templates ({names}) and no default. Save the right one as a .jinja file "
                "and name it with --data.chat_template.",
                code="template-ambiguous",
            )
        text = own["default"] if "default" in own else next(iter(own.values()))
    if not isinstance(text, str):
        raise ModelError(
            f"the model's chat_template (tokenizer_config.json) is of type {type(text).__name__}, not a text. Correct "
            "it, or name a template with --data.chat_template.",
            code="template-not-text",
        )
    return text


def require_template_file(folder: str) -> None:
    """Check that chat_template.jinja, if present, is a file; transformers silently ignores anything else.

    Raises:
        ModelError: it exists and is not a file.
    """
    path = Path(folder) / "chat_template.jinja"
    if os.path.lexists(path) and not path.is_file():
        raise ModelError(
            f"{path}: is a folder, a pipe or a broken link, not a file. Put the template's text there.",
            code="template-not-a-file",
        )


def load_built_in(name: str, add_bos: bool) -> str:
    text = resources.files("tunesmith").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token }}" + text if add_bos else text
