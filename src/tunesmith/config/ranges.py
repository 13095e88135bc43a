"""Explain a wrong value of a key: what is expected, an example, and the value that was given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from tunesmith.config.plainyaml import show

_NUMBERS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "int_type",
            "int_parsing", "int_parsing_size", "int_from_float", "float_type", "float_parsing")  # fmt: skip
_EXAMPLES: dict[str, Any] = {  # of keys whose default is null, 0 or 1
    "data.empty_think_share": 0.2, "data.eval_split": 0.05, "data.system_prompt_share": 0.2, "data.max_seq_len": 2048,
    "data.limit": 1000, "data.train.weight": 0.3, "data.train.epochs": 2, "data.train.limit": 1000,
    "optim.warmup_steps": 100,
    "optim.min_lr_ratio": 0.1, "optim.weight_decay": 0.01, "optim.betas": 0.999, "lora.alpha": 32, "lora.dropout": 0.05,
    "train.max_steps": 1000, "train.micro_batch_tokens": 4096, "train.eval_steps": 100, "train.save_steps": 500,
    "train.early_stop_patience": 3,
}  # fmt: skip
_HINTS = {"data.eval_split": "a number of rows: put them into a file, and give it as data.eval"}


def explain_value(dotted: str, field: FieldInfo | None, kind: str, value: Any) -> str | None:
    """What a key needs and what it was given; None where pydantic's own words have to do.

    Args:
        kind: pydantic's type of the error.
    """
    given = f"not {show(value)}"
    if field is not None and kind in _NUMBERS:
        needed = f"must be {describe_range(field)}, such as {example_of(dotted, field)}, {given}"
        is_share = bounds_of(field).get("lt", bounds_of(field).get("le")) == 1
        if is_share and isinstance(value, int | float) and 1 < value <= 100:
            needed += f"; {value:g} % is {value / 100:g}"
        return f"{needed}; {_HINTS[dotted]}" if dotted in _HINTS else needed
    if kind.startswith("bool_"):
        return f"must be true or false, {given}"
    if kind == "string_type":
        quotes = f"; in YAML, put it in quotes: '{value}'" if isinstance(value, bool | int | float) else ""
        return f"must be text, {given}{quotes}"
    if kind in ("list_type", "tuple_type"):
        return f"must be a list, such as [a, b], {given}"
    if kind == "dict_type":
        return f"needs keys with values below it, {given}"
    return None


def describe_range(field: FieldInfo) -> str:
    """The numbers that a key takes, in words."""
    bounds = bounds_of(field)
    if len(bounds) > 1 and bounds.get("le") == 2**53:  # _Interval of the schema
        return "a whole number of steps, or a share of all steps between 0 and 1"
    top = bounds.get("lt", bounds.get("le", math.inf))
    noun = "a share" if top == 1 else "a whole number" if _is_whole(field.annotation) else "a number"
    if top == math.inf:
        return f"{noun} above {bounds['gt']:g}" if "gt" in bounds else f"{noun} of {bounds.get('ge', 0):g} or more"
    bottom = f"above {bounds['gt']:g}" if "gt" in bounds else f"of at least {bounds['ge']:g}"
    return f"{noun} {bottom} and {'below' if 'lt' in bounds else 'at most'} {_exact(top)}"


def example_of(dotted: str, field: FieldInfo) -> Any:
    """A value that the key takes."""
    example = _EXAMPLES.get(dotted, field.default)
    return int(example) if example == int(example) else example


def bounds_of(field: FieldInfo) -> dict[str, float]:
    """ "ge", "gt", "le" and "lt" with their numbers."""
    found: dict[str, float] = {}
    for constraint in _constraints(field):
        for name in ("ge", "gt", "le", "lt"):
            if (bound := getattr(constraint, name, None)) is not None:
                found[name] = bound
    return found


def _constraints(field: FieldInfo) -> Iterator[Any]:
    """Those of the key, and of what it holds: float | None, tuple[Annotated[float, ...], ...]."""
    yield from field.metadata
    waiting = [field.annotation]
    while waiting:
        for part in get_args(waiting.pop()):
            if isinstance(part, FieldInfo):
                yield from part.metadata
            else:
                waiting.append(part)


def _is_whole(annotation: Any) -> bool:
    return annotation is int or int in get_args(annotation)


def _exact(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
