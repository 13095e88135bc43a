"""Items of data.train: a name, or a source with a name, an amount and a limit of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, field_validator, model_serializer

from tunesmith.config.plainyaml import show
from tunesmith.config.ranges import explain_value
from tunesmith.config.section import Section
from tunesmith.config.suggest import did_you_mean, suggest_words

_MAX_NAME = 100
_OTHER_WORDS = {
    "data": "path", "file": "path", "dataset": "path", "source": "path", "id": "path", "data_files": "path",
    "label": "name", "title": "name", "ratio": "weight", "share": "weight", "prob": "weight", "proportion": "weight",
    "probability": "weight", "fraction": "weight", "sampling_ratio": "weight", "repeat": "epochs", "times": "epochs",
    "passes": "epochs", "num_epochs": "epochs", "max_samples": "limit", "num_samples": "limit", "rows": "limit",
    "max_rows": "limit", "size": "limit",
}  # fmt: skip
_OF_ALL = {"split": "write path: owner/name:SPLIT", "config": "write path: owner/name:CONFIG:SPLIT"}


class SourceSection(Section):
    path: str
    """File, folder, glob or hub id (owner/name, owner/name:split)."""
    name: str | None = None
    """Name of the source in metrics and reports; default: the file's name."""
    weight: float | None = Field(default=None, gt=0.0)
    """Share of the training tokens, relative to the weights of all sources."""
    epochs: float | None = Field(default=None, gt=0.0, le=1000.0)
    """Passes over the source in one pass over all: 3 repeats its rows, 0.5 takes another half of them each time."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many of its rows, the first ones."""

    @field_validator("name")
    @classmethod
    def _keep_name(cls, name: str | None) -> str | None:
        if name is not None and (len(name) > _MAX_NAME or not name.isprintable()):
            raise ValueError(f"must be a short text on one line, not {show(name, 40)}")
        return name

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def amount(self) -> tuple[float | None, float | None, int | None]:
        return self.weight, self.epochs, self.limit


Source = str | SourceSection


def read_sources(given: Any) -> Any:
    """The items of data.train, each mapping as a SourceSection.

    Raises:
        ValueError: all problems, one a line.
    """
    if not isinstance(given, list | tuple):
        return given
    sources: list[Source] = []
    problems: list[str] = []
    for number, item in enumerate(given, 1):
        if isinstance(item, str | SourceSection):
            sources.append(item)
        elif isinstance(item, Mapping):
            try:
                sources.append(SourceSection.model_validate(item))
            except ValidationError as error:
                problems += [f"source {number}: {problem}" for problem in _explain(error)]
        else:
            problems.append(explain_value("data.train", None, "string_type", item) or "")
    problems += [] if problems else check_sources(sources)
    if problems:
        raise ValueError("\n".join(problems))
    return sources


def _explain(error: ValidationError) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        key = str(item["loc"][0])
        if item["type"] == "missing":
            problems.append(f"{key}: missing; it names a file, a folder or a hub data set")
        elif item["type"] == "extra_forbidden":
            problems.append(f"{key}: unknown key{_explain_key(key)}")
        elif item["type"] == "value_error":
            problems.append(f"{key}: {item['ctx']['error']}")
        else:
            needed = explain_value(
                f"data.train.{key}", SourceSection.model_fields.get(key), item["type"], item["input"]
            )
            problems.append(f"{key}: {needed or item['msg']}")
    return problems


def _explain_key(key: str) -> str:
    known = list(SourceSection.model_fields)
    if key in _OF_ALL:
        return f"; {_OF_ALL[key]}"
    if key in _OTHER_WORDS:
        return f"; did you mean {_OTHER_WORDS[key]}?"
    return did_you_mean(suggest_words(key, known)) or (
        f"; a source has {', '.join(known)}, and the other keys of data hold for all sources"
    )


def check_sources(sources: Sequence[Source]) -> list[str]:
    """Amounts that contradict each other, and names given twice."""
    problems = []
    has_weight = [isinstance(item, SourceSection) and item.weight is not None for item in sources]
    for number, item in enumerate(sources, 1):
        what = f"source {number} ({show(path_of(item), 60)})"
        if isinstance(item, SourceSection) and item.weight is not None and item.epochs is not None:
            problems.append(f"{what}: has a weight and epochs; keep one of the two")
        elif any(has_weight) and not has_weight[number - 1]:
            problems.append(f"{what}: has no weight, and other sources have one; give each a weight, or none")
    given = Counter(item.name for item in sources if isinstance(item, SourceSection) and item.name)
    problems += [f"two sources are named {show(name, 60)}" for name, count in given.items() if count > 1]
    return problems


def is_mix(sources: Sequence[Source]) -> bool:
    """Whether the sources are told apart in metrics and reports: one of them is more than a name."""
    return len(sources) > 1 and any(isinstance(item, SourceSection) for item in sources)


def has_amounts(sources: Sequence[Source]) -> bool:
    return any(isinstance(item, SourceSection) and (item.weight or item.epochs) for item in sources)


def path_of(source: Source) -> str:
    return source.path if isinstance(source, SourceSection) else source


def with_path(source: Source, path: str) -> Source:
    return source.model_copy(update={"path": path}) if isinstance(source, SourceSection) else path


def name_sources(sources: Sequence[Source]) -> list[str]:
    """A name for each source: the one given, else its file without folder and suffix, else its path."""
    names = [item.name if isinstance(item, SourceSection) else None for item in sources]
    short = [_shorten(path_of(item)) for item in sources]
    counts = Counter([*short, *names])
    chosen: list[str] = []
    for item, name, brief in zip(sources, names, short, strict=True):
        free = name or (brief if counts[brief] == 1 else path_of(item))
        chosen.append(free if free not in chosen else f"{free} ({len(chosen) + 1})")
    return chosen


def _shorten(path: str) -> str:
    """The name of a file without its suffixes; a hub id, a pattern or a folder's split stays as it is."""
    name = PurePath(path).name
    stem = re.sub(r"(\.[A-Za-z]\w{0,7}){1,2}$", "", name)
    is_file = stem != name and not any(mark in path for mark in "*?[:")
    return stem if is_file and stem else path


def amounts_of(train: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What decides how much of each item of a saved data.train is trained on, whatever its path."""
    keys = ("weight", "epochs", "limit")
    return [tuple(item.get(key) for key in keys) if isinstance(item, Mapping) else (None,) * 3 for item in train]
