"""Chat templates: messages -> text, as transformers renders them, but with the run's date instead of today's."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.data.conversation import Message
from tunesmith.errors import ModelError

BUILT_IN = ("chatml", "alpaca")


class TemplateRefused(Exception):
    """The template itself rejects these messages (raise_exception, a missing key)."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant says; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def _compile(text: str) -> jinja2.Template:
    """Sandboxed: a template from a hub is code of a stranger."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(text)


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
        try:
            return _compile(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"chat template {self.source}, line {error.lineno}: {error.message}. Mend the template or name "
                "another one with --data.chat_template."
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of these messages.

        Raises:
            TemplateRefused: with the template's own reason.
        """
        variables: dict[str, Any] = {**self.special_tokens, **self.kwargs}
        turns = [message.to_template() for message in messages]
        for turn in turns:
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]  # gpt-oss reads this name
        template = self._compiled
        try:
            return template.render(
                messages=turns,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.date.strftime,
                **variables,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may divide by zero or recurse without end
            raise TemplateRefused(str(error) or type(error).__name__) from None


def find_template(
    choice: str | None, own: str | Mapping[str, str] | None, special_tokens: Mapping[str, str], add_bos: bool
) -> tuple[str, str, bool]:
    """The text, source and is_fallback of the template that a run uses.

    Args:
        choice: data.chat_template: a .jinja path, a built-in name, or None for the model's own.
        own: what the tokenizer carries, if anything.
        add_bos: whether the tokenizer starts its texts with BOS; our built-in templates then do too.
    """
    if choice is None:
        if own:
            text = own if isinstance(own, str) else own.get("default") or next(iter(own.values()))
            return text, "the model's own", False
        return load_built_in("alpaca", add_bos), "alpaca", True
    if choice in BUILT_IN:
        return load_built_in(choice, add_bos), choice, False
    path = Path(choice).expanduser()
    if not path.is_file():
        raise ModelError(
            f"data.chat_template {choice}: no such file, and no built-in template of that name "
            f"({', '.join(BUILT_IN)}, none)."
        )
    try:
        return path.read_text(encoding="utf-8"), str(path), False
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"data.chat_template {choice}: cannot be read: {error}.") from None


def load_built_in(name: str, add_bos: bool) -> str:
    text = resources.files("tunesmith").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token }}" + text if add_bos else text
