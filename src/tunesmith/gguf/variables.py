"""The variables of a run's chat template (data.template_kwargs), written into the template itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tunesmith.errors import ModelError

_KEYWORDS = frozenset(
    "and elif else endfor endif for if import in is not or recursive none true false None True False".split()  # noqa: SIM905
)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def set_variables(text: str, variables: Mapping[str, Any]) -> str:
    """The template with its variables set in front.

    Each stands on a line of its own, whose end transformers and llama.cpp leave out (trim_blocks), so the template
    still begins at the start of a line. Names that a template cannot say are left out.

    Raises:
        ModelError: a value that a template cannot say.
    """
    named = {name: value for name, value in variables.items() if name.isidentifier() and name not in _KEYWORDS}
    return "".join(f"{{% set {name} = {_spell(name, value)} %}}\n" for name, value in named.items()) + text


def _spell(name: str, value: Any) -> str:
    """A value as Jinja spells it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float() if math.isfinite(value):
            text = format(Decimal(repr(value)), "f")  # llama.cpp knows no exponents
            return text if "." in text else f"{text}.0"
        case str():
            return f'"{"".join(_ESCAPES.get(letter, letter) for letter in value)}"'
        case list() | tuple():
            return f"[{', '.join(_spell(name, part) for part in value)}]"
        case dict():
            parts = (f"{_spell(name, key)}: {_spell(name, part)}" for key, part in value.items())
            return f"{{{', '.join(parts)}}}"
    raise ModelError(
        f"data.template_kwargs.{name}: {value!r} cannot be written into a template, so the model cannot be exported "
        "with it.",
        code="no-gguf-form",
    )
