"""The arguments of the Python API as sections of a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from tunesmith.config.runfile import STAGES
from tunesmith.errors import ConfigError, DataError, UsageError
from tunesmith.sources.memory import is_rows

Name = str | os.PathLike[str]
Rows = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One of several data sets to train on, with its amount. A dict in a list is a row; a Source is not.

        >>> [Source("chats.jsonl", weight=0.7), Source("books.txt", weight=0.3)]  # doctest: +SKIP

    Attributes:
        path: a file, a folder, a pattern or a hub id.
        name: in metrics and reports; default: the file's name.
        weight: share of the training tokens, relative to the weights of all sources.
        epochs: passes over it in one pass over all; give weights or epochs.
        limit: read only this many rows.
    """

    path: Name
    name: str | None = None
    weight: float | None = None
    epochs: float | None = None
    limit: int | None = None

    def to_section(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in (values | {"path": _text(self.path)}).items() if value is not None}


def read_arguments(
    model: Any, data: Any, tokenizer: Any, eval_data: Any, sections: Mapping[str, Any]
) -> tuple[dict[str, Any], Rows]:
    """The arguments as sections of a config, and the rows among them by their key of the data section."""
    tree: dict[str, Any] = {
        name: dict(below) if isinstance(below, Mapping) else below for name, below in sections.items()
    }
    tree |= {"model": dict(model)} if isinstance(model, Mapping) else {}
    tree |= {"data": dict(data)} if isinstance(data, Mapping) else {}
    if model is not None and not isinstance(model, Mapping):
        section_of(tree, "model")["path"] = os.fspath(model)
    if tokenizer is not None:
        section_of(tree, "model")["tokenizer"] = os.fspath(tokenizer)
    if data is not None and not isinstance(data, Mapping):
        section_of(tree, "data")["train"] = data
    if eval_data is not None:
        section_of(tree, "data")["eval"] = eval_data
    tree = _texts(tree)
    rows: Rows = {}
    below = tree["data"] if isinstance(tree.get("data"), dict) else {}
    for key in ("train", "eval"):
        if key == "train" and has_sources(below.get(key)):
            below[key] = _sections(below[key])
        elif is_rows(below.get(key)):
            rows[key] = below[key]
            below[key] = [f"rows:{key}"]
        elif key in below:
            below[key] = _names(below[key])
    return tree, rows


_SOURCE_KEYS = {field.name for field in fields(Source)}


def has_sources(data: Any) -> bool:
    """Whether a data argument is a Source, or a list with one.

    Raises:
        DataError: dicts that can only be meant as sources.
    """
    items = data if isinstance(data, (list, tuple)) else [data]
    if any(isinstance(item, Source) for item in items):
        return True
    if items and all(isinstance(item, Mapping) and "path" in item and set(item) <= _SOURCE_KEYS for item in items):
        raise DataError(
            "data: a dict in a list is a row, and these have only the keys of a source. Give each source as "
            "tunesmith.Source(path, weight=...).",
            code="source-as-row",
        )
    return False


def _sections(data: Any) -> list[Any]:
    """Sources and names as the items of data.train.

    Raises:
        DataError: another thing is among them.
    """
    sections: list[Any] = []
    for item in data if isinstance(data, (list, tuple)) else [data]:
        if not isinstance(item, (Source, str, os.PathLike)):
            raise DataError(
                f"data: a {type(item).__name__} beside a tunesmith.Source; rows and sources cannot be mixed. Write the "
                "rows to a file, and give a Source of it.",
                code="rows-beside-sources",
            )
        sections.append(item.to_section() if isinstance(item, Source) else _text(item))
    return sections


def section_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    below = tree.setdefault(name, {})
    if not isinstance(below, dict):
        raise ConfigError("the arguments", [f"{name}: is a section; give a dict of its keys"])
    return below


def _texts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with every path as text; rows stay as they are."""
    changed: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            changed[name] = _texts(value)
        elif name == STAGES and isinstance(value, (list, tuple)):
            changed[name] = [_stage(item) if isinstance(item, Mapping) else item for item in value]
        else:
            changed[name] = _text(value)
    return changed


def _stage(item: Mapping[str, Any]) -> dict[str, Any]:
    """A stage of the argument `stages`. Its data cannot be rows, since a run reads the data of later stages later.

    Raises:
        UsageError: they are rows.
    """
    stage, data = _texts(item), item.get("data")
    if not isinstance(data, Mapping):
        return stage
    for key in ("train", "eval"):
        if key == "train" and has_sources(data.get(key)):
            stage["data"][key] = _sections(data[key])
        elif is_rows(data.get(key)):
            refuse_rows_with_stages(f"stages: {key} of {item.get('name')}")
        elif key in data:
            stage["data"][key] = _names(data[key])
    return stage


def refuse_rows_with_stages(where: str) -> NoReturn:
    """Raises:
    UsageError: rows in memory were given to a run with stages.
    """
    raise UsageError(
        f"{where}: are rows in memory. A run with stages reads files, so that it can be resumed between two stages. "
        "Save the rows as .jsonl and give the file's name.",
        code="rows-with-stages",
    )


def _names(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [_text(name) for name in given]
    return given


def _text(value: Any) -> Any:
    """A path as text; another value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_path(name: Name | None) -> Path | None:
    return Path(name) if name is not None else None
