"""Score the tool calls of a reply: against the schemas of the row's tools, and against the reference's calls."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import regex

from tunesmith.evaluation.forms import INVALID, load_json, spell_json
from tunesmith.generation.reply_parts import ToolCall

_PATTERN_S = 1.0  # a pattern of a schema may take exponential time
_MOST_STEPS = 100_000  # keywords applied to a value: references in references may multiply


def score_calls(
    calls: Sequence[ToolCall], reference: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Scores of a reply in a row with tools, or whose reference calls some.

    Args:
        tools: schemas as {"type": "function", "function": {...}}.
    """
    scores: dict[str, float] = {}
    if tools:
        scores["tool_choice"] = float(bool(calls) == bool(reference))
    if not reference:
        return scores
    schemas = _schemas(tools)
    if schemas:
        scores["tool_name"] = float(bool(calls) and all(call.name in schemas for call in calls))
        verdicts = [
            fits_schema(_arguments(call), schemas[call.name]) if call.name in schemas else False for call in calls
        ]
        if None not in verdicts:
            scores["tool_arguments"] = float(bool(calls) and all(verdicts))
    scores["tool_equal"] = float(Counter(map(_spell, calls)) == Counter(map(_spell, reference)))
    return scores


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name of each tool -> the schema of its arguments."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found[function["name"]] = function.get("parameters")
    return found


def _arguments(call: ToolCall) -> Any:
    """The call's arguments as a JSON value; INVALID where they are broken."""
    return load_json(call.arguments) if isinstance(call.arguments, str) else call.arguments


def _spell(call: ToolCall) -> tuple[str, str]:
    arguments = _arguments(call)
    return call.name, call.text if arguments is INVALID else spell_json(arguments)


def fits_schema(arguments: Any, schema: Any) -> bool | None:
    """Whether arguments are an object that fits a JSON schema; None where the schema itself cannot be used."""
    if not isinstance(arguments, dict):
        return False
    return True if schema is None else matches_schema(arguments, schema)


def matches_schema(value: Any, schema: Any) -> bool | None:
    """Whether a JSON value fits a JSON schema; None where the schema itself cannot be used.

    No reference to another document is followed, a pattern has a second, and the number of steps is bounded.
    """
    if not is_schema(schema):
        return None
    try:
        return bool(_validator_class(schema)(schema, registry=_no_registry()).is_valid(value))
    except Exception:  # jsonschema and referencing: unknown types, endless references
        return None


def is_schema(schema: Any) -> bool:
    """Whether a JSON value is a JSON schema that can be used."""
    if not isinstance(schema, (dict, bool)):
        return False
    try:
        _validator_class(schema).check_schema(schema)
    except Exception:  # jsonschema: broken schemas
        return False
    # jsonschema matches these patterns itself, and they may never end
    return not (_has_key(schema, "unevaluatedProperties") and _has_key(schema, "patternProperties"))


def _no_registry() -> Any:
    from referencing import Registry

    return Registry()


def _has_key(schema: Any, key: str) -> bool:
    if isinstance(schema, dict):
        return key in schema or any(_has_key(below, key) for below in schema.values())
    return isinstance(schema, list) and any(_has_key(below, key) for below in schema)


def _validator_class(schema: Any) -> Any:
    """jsonschema's class for the dialect of a schema, with patterns that end, and as many steps as are allowed."""
    from jsonschema import validators

    own = validators.validator_for(schema, default=validators.Draft202012Validator)
    matching = {
        "pattern": _match_pattern,
        "patternProperties": _match_properties,
        "additionalProperties": _match_others,
    }
    steps = itertools.count(1)

    def counted(check: Callable[..., Iterable[Any] | None]) -> Callable[..., Iterator[Any]]:
        def apply(*given: Any) -> Iterator[Any]:
            if next(steps) > _MOST_STEPS:
                raise TimeoutError
            yield from check(*given) or ()

        return apply

    keywords = {name: counted(matching.get(name, check)) for name, check in own.VALIDATORS.items()}
    return validators.extend(own, keywords)


def _match_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(instance, str) and not _finds(pattern, instance):
        yield ValidationError("does not match")


def _match_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, dict):
        for pattern, below in patterns.items():
            for key, value in instance.items():
                if _finds(pattern, key):
                    yield from validator.descend(value, below, path=key, schema_path=pattern)


def _match_others(validator: Any, below: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, dict):
        patterns = schema.get("patternProperties", {})
        for key, value in instance.items():
            if key not in schema.get("properties", {}) and not any(_finds(pattern, key) for pattern in patterns):
                yield from validator.descend(value, below, path=key)


def _finds(pattern: str, text: str) -> bool:
    """Raises:
    TimeoutError: it takes too long.
    """
    return regex.search(pattern, text, timeout=_PATTERN_S) is not None
