"""Values of flags: parsed, or refused with what is needed."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def as_name(text: str) -> str:
    """Name of a file, folder or model; an empty one comes from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a name")
    return text


def as_count(text: str) -> int:
    return int(number(text, "a whole number of 0 or more, such as 50", lambda value: 0 <= value <= sys.maxsize, int))


def one_of(options: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        from tunesmith.config.suggest import did_you_mean, suggest_words

        if text not in options:
            hint = did_you_mean(suggest_words(text, options))
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(options)}{hint}")
        return text

    return parse


def as_part(text: str) -> float:
    return number(text, "a number from 0 to 1, such as 0.05", lambda value: 0 <= value <= 1)


def as_path(text: str) -> Path:
    return Path(as_name(text))


def as_positive(text: str) -> int:
    return int(number(text, "a whole number of 1 or more, such as 5", lambda value: 1 <= value <= sys.maxsize, int))


def as_penalty(text: str) -> float:
    return number(text, "a number above 0, such as 1.1", lambda value: 0 < value < math.inf)


def as_port(text: str) -> int:
    return int(number(text, "a port from 0 to 65535, such as 8000", lambda value: 0 <= value <= 65535, int))


def as_seconds(text: str) -> float:
    return number(text, "a number of seconds above 0, such as 30", lambda value: 0 < value <= 10**7)


def as_seed(text: str) -> int:
    from tunesmith.config.train_keys import LARGEST_SEED

    needed = f"a whole number from 0 to {LARGEST_SEED}, such as 42"
    return int(number(text, needed, lambda value: 0 <= value <= LARGEST_SEED, int))


def as_share(text: str) -> float:
    return number(text, "a share above 0 and at most 1, such as 0.5", lambda value: 0 < value <= 1)


def as_temperature(text: str) -> float:
    return number(text, "a number of 0 or more, such as 0.7", lambda value: math.isfinite(value) and value >= 0)


def as_weight(text: str) -> float:
    return number(text, "a number, such as 0.5", math.isfinite)


def number(text: str, needed: str, fits: Callable[[Any], bool], kind: type[int] | type[float] = float) -> float:
    """The number that a flag gives.

    Raises:
        argparse.ArgumentTypeError: it is none, or does not fit; says what is needed.
    """
    with suppress(ValueError):
        if fits(value := kind(text)):
            return value
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise argparse.ArgumentTypeError(f"must be {needed}, not {shown!r}")
